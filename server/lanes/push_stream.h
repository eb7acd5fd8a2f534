// The server's side of one Push or SetState call: it turns the chunks of the stream into staged
// pieces.
#pragma once

#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "orlop/v1/data.pb.h"
#include "proto/chunk.h"
#include "server/lanes/region.h"
#include "server/runtime/job_table.h"
#include "server/runtime/wait.h"

namespace orlop::server {

// If the stream breaks off inside a piece, that piece leaves nothing behind; the pieces before it
// stay staged.
//   Threads  not thread-safe: one call owns it.
class PushStream {
 public:
  // `jobs` must outlive this object. `is_load`: SetState. `wait`: how long the call may wait for
  // other copies of a shard.
  PushStream(JobTable* jobs, bool is_load, Wait wait)
      : jobs_(jobs), is_load_(is_load), wait_(std::move(wait)) {}

  struct Taken {
    bool is_later = false;  // the attempt of the chunk is not open yet: give the same chunk again
    absl::Status status;    // if `is_later`: the error for a caller that does not
  };
  // Takes the next message. If the answer is *later*, the job keeps `wakeup` and wakes it when its
  // state has changed. After an error the stream is over.
  //   Status  as Data.Push (data.proto)
  Taken Take(const DecodedChunk& chunk, const std::shared_ptr<Wakeup>& wakeup);
  // Ends the stream after the client's last message.
  //   Status  InvalidArgument: the stream was empty or ends inside a piece
  absl::Status Finish();
  // The number of pieces and bytes that were taken so far.
  const v1::PushResponse& response() const { return response_; }

 private:
  absl::Status Open(const v1::StreamKey& key);
  Taken Begin(const DecodedChunk& chunk, const std::shared_ptr<Wakeup>& wakeup);
  absl::Status Write(const DecodedChunk& chunk);
  absl::StatusOr<PieceRequest> RequestOf(const v1::Chunk& header);
  absl::Status EndPiece(const Digest128& digest);
  absl::Status Explained(const absl::Status& status) const;  // see Explain

  JobTable* const jobs_;
  const bool is_load_;
  const Wait wait_;
  std::shared_ptr<JobRuntime> job_;
  std::shared_ptr<const JobModel> model_;
  v1::StreamKey key_;
  bool is_again_ = false;  // the last chunk was answered *later*
  StreamPlace place_;
  std::optional<PieceTicket> ticket_;  // of the piece under way; absent between pieces
  v1::PushResponse response_;
};

}  // namespace orlop::server
