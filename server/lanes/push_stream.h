// One Push or SetState stream: from its chunks to staged pieces.
#pragma once

#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "orlop/v1/data.pb.h"
#include "proto/chunk.h"
#include "server/lanes/region.h"
#include "server/runtime/job_table.h"

namespace orlop::server {

// Not thread-safe: one call owns it. A piece that is cut off leaves nothing behind.
class PushStream {
 public:
  PushStream(JobTable* jobs, bool is_load, Wait wait)
      : jobs_(jobs), is_load_(is_load), wait_(std::move(wait)) {}

  // Takes the next message. Statuses as Data.Push.
  absl::Status Take(const DecodedChunk& chunk);
  // After the client's half-close. InvalidArgument if the stream is empty or ends inside a piece.
  absl::Status Finish();
  const v1::PushResponse& response() const { return response_; }

 private:
  absl::Status Open(const v1::StreamKey& key);
  absl::Status BeginPiece(const v1::Chunk& header);
  absl::StatusOr<PieceRequest> RequestOf(const v1::Chunk& header);
  absl::Status EndPiece(const Digest128& digest);
  absl::Status Explained(const absl::Status& status) const;

  JobTable* const jobs_;
  const bool is_load_;
  const Wait wait_;
  std::shared_ptr<JobRuntime> job_;
  std::shared_ptr<const JobModel> model_;
  v1::StreamKey key_;
  StreamPlace place_;
  std::optional<PieceTicket> ticket_;  // of the piece under way
  v1::PushResponse response_;
};

}  // namespace orlop::server
