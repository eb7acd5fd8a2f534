// One call of Data.Pull: it reads the request and writes the chunks of what was asked for, one at a
// time.
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "orlop/v1/data.pb.h"
#include "server/lanes/pull_stream.h"
#include "server/memory/request_room.h"
#include "server/services/gate.h"

namespace orlop::server {

class PullCall final : public StreamCall {
 public:
  // `jobs` must outlive the call.
  PullCall(Gate* gate, grpc::GenericCallbackServerContext* context, JobTable* jobs);

 private:
  void OnReadDone(bool is_read) override;
  void OnWriteDone(bool is_written) override;
  void OnCancel() override { pending_->Cancel(); }
  void Begin();
  void Advance();
  void AskFor(int32_t shard, int64_t version);
  void Open(const absl::StatusOr<JobRuntime::VersionPin>& pin);
  void End(const absl::Status& status);

  JobTable* const jobs_;
  grpc::ByteBuffer message_;  // the request, then the chunk that is written
  RequestRoom::Held room_;    // of request_
  v1::PullRequest request_;
  std::optional<PullStream> pull_;
  const std::shared_ptr<Pending> pending_ = std::make_shared<Pending>();
};

}  // namespace orlop::server
