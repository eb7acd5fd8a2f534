// The arguments and results of the two calls by which a piece enters a job: JobRuntime::BeginPiece
// before its bytes are received, and JobRuntime::EndPiece when they are complete. Each takes the
// job's lock once.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/box.h"
#include "orlop/v1/types.pb.h"
#include "server/job/job_model.h"
#include "server/job/slots.h"
#include "server/shards/piece_writer.h"
#include "server/step/messages.h"
#include "server/step/participant.h"

namespace orlop::server {

// A piece that a worker wants to send.
struct PieceRequest {
  step::AttemptKey key;
  step::Rank rank = 0;
  double loss_scale = 1.0;
  uint32_t tensor = 0;                      // index in the manifest
  int32_t shard = 0;                        // the shard's id; this server owns it
  Box box;                                  // as NormalBox returns it
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;  // of the bytes on the wire; must be specified
  bool is_load = false;                     // true: SetState. The fields below are for it only
  Slot slot = Slot::kWeight;
  int64_t applied_count = -1;  // updates that the tensor has seen; -1: the client has not said
};

// A piece whose bytes may be sent. Not thread-safe: one stream owns it. Destroying it before
// EndPiece leaves nothing of the piece behind.
struct PieceTicket {
  step::PushPiece piece;
  std::unique_ptr<PieceWriter> writer;
};

// The answer to BeginPiece: a ticket, a refusal, or *later*.
struct BegunPiece {
  // The request is ahead of this server. The job wakes the caller when to ask again; `status` is
  // the answer to give when waiting ends.
  bool is_later = false;
  absl::Status status;  // OK if and only if there is a ticket
  std::optional<PieceTicket> ticket;
};

// The piece that a request is about, as the step machine knows it. `layout`: of the generation that
// has formed here; null if none has.
//   Status  Unavailable: no layout yet. InvalidArgument: its rank does not contribute that box.
absl::StatusOr<step::PushPiece> PieceOf(const PieceRequest& request, const JobModel& model,
                                        const step::Layout* layout);

}  // namespace orlop::server
