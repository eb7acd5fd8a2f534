// One call of Data.Pull: it reads the request and writes the chunks of what was asked for, one at a
// time.
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include <functional>
#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "base/mutex.h"
#include "orlop/v1/data.pb.h"
#include "server/lanes/pull_stream.h"
#include "server/memory/read_room.h"
#include "server/memory/request_room.h"
#include "server/services/gate.h"

namespace orlop::server {

// Counts the built chunks of one pull that gRPC keeps.
//   Threads  all methods are safe from any thread.
class BuiltChunks {
 public:
  void Begin();
  void End();
  int count() const;
  // Returns whether there are fewer than `limit`. If not, `resume` runs once when there are, or
  // when GiveUp is called.
  bool AreFewerThan(int limit, std::function<void()> resume);
  bool has_ended() const;
  // The call ends: nobody waits for a chunk to be sent.
  void GiveUp();

 private:
  mutable Mutex mutex_;
  int count_ GUARDED_BY(mutex_) = 0;
  bool has_ended_ GUARDED_BY(mutex_) = false;
  int limit_ GUARDED_BY(mutex_) = 0;  // of resume_
  std::function<void()> resume_ GUARDED_BY(mutex_);
};

class PullCall final : public StreamCall {
 public:
  // `jobs` and `reads` must outlive the call.
  PullCall(Gate* gate, grpc::GenericCallbackServerContext* context, JobTable* jobs,
           ReadRoom* reads);

 private:
  void OnReadDone(bool is_read) override;
  void OnWriteDone(bool is_written) override;
  void Cancelled() override;
  bool IsWanted() const override { return read_room_.is_wanted(); }
  void Begin();
  void Advance();
  void AdvanceWithin(int limit);
  void AskFor(int32_t shard, int64_t version);
  void Open(const absl::StatusOr<JobRuntime::VersionPin>& pin);
  void End(const absl::Status& status);

  JobTable* const jobs_;
  grpc::ByteBuffer message_;  // the request, then the chunk that is written
  RequestRoom::Held room_;    // of request_
  v1::PullRequest request_;
  ReadRoom::Held read_room_;
  std::optional<PullStream> pull_;
  // Built chunks that gRPC has not sent yet.
  const std::shared_ptr<BuiltChunks> built_ = std::make_shared<BuiltChunks>();
  const std::shared_ptr<Pending> pending_ = std::make_shared<Pending>();
};

}  // namespace orlop::server
