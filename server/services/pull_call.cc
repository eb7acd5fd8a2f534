#include "server/services/pull_call.h"

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/handover.h"
#include "base/mutex.h"
#include "orlop/v1/data.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/chunk.h"
#include "proto/limits.h"
#include "proto/parse_bound.h"
#include "proto/status.h"
#include "server/lanes/pull_stream.h"
#include "server/memory/accountant.h"
#include "server/memory/read_room.h"
#include "server/memory/request_room.h"
#include "server/runtime/job_table.h"
#include "server/services/gate.h"
#include "server/shards/shard_store.h"
#include "server/step/actions.h"

namespace orlop::server {
namespace {

// The memory of a chunk until gRPC has sent it.
struct Sent {
  BufferPtr owner;
  std::shared_ptr<BuiltChunks> built;  // null: the chunk was not built

  ~Sent() {
    owner.reset();
    if (built != nullptr) built->End();
  }
};

grpc::Slice SliceOf(const ReadChunk& chunk, const std::shared_ptr<BuiltChunks>& built) {
  auto* sent = new Sent{chunk.owner, chunk.is_built ? built : nullptr};
  if (chunk.is_built) built->Begin();
  return grpc::Slice(
      const_cast<uint8_t*>(chunk.bytes.data()), chunk.bytes.size(),
      [](void* held) { delete static_cast<Sent*>(held); }, sent);
}

}  // namespace

// ---- BuiltChunks -------------------------------------------------------------------------------

void BuiltChunks::Begin() {
  MutexLock lock(&mutex_);
  ++count_;
}

void BuiltChunks::End() {
  std::function<void()> resume;
  {
    MutexLock lock(&mutex_);
    if (--count_ < limit_) resume.swap(resume_);
  }
  if (resume) resume();
}

int BuiltChunks::count() const {
  MutexLock lock(&mutex_);
  return count_;
}

bool BuiltChunks::has_ended() const {
  MutexLock lock(&mutex_);
  return has_ended_;
}

bool BuiltChunks::AreFewerThan(int limit, std::function<void()> resume) {
  MutexLock lock(&mutex_);
  if (count_ < limit || has_ended_) return true;
  limit_ = limit;
  resume_ = std::move(resume);
  return false;
}

void BuiltChunks::GiveUp() {
  std::function<void()> resume;
  {
    MutexLock lock(&mutex_);
    has_ended_ = true;
    resume.swap(resume_);
  }
  if (resume) resume();
}

// ---- PullCall ----------------------------------------------------------------------------------

PullCall::PullCall(Gate* gate, grpc::GenericCallbackServerContext* context, JobTable* jobs,
                   ReadRoom* reads)
    : StreamCall(gate, context), jobs_(jobs), read_room_(reads) {
  BeginTransfer();
  StartRead(&message_);
}

void PullCall::OnReadDone(bool is_read) {
  TellTaken(this);
  EndTransfer();
  if (!is_read)
    return End(MakeError(absl::StatusCode::kInvalidArgument, "the call has no request",
                         v1::ErrorDetail::BAD_REQUEST));
  Submit([this] { Begin(); });
}

void PullCall::Begin() {
  static const auto* bound = new ParseBound(v1::PullRequest::default_instance());
  absl::StatusOr<RequestRoom::Held> room =
      gate().Parse(&message_, kMaxControlMessageBytes, *bound, &request_);
  if (!room.ok()) return End(room.status());
  room_ = *std::move(room);
  if (absl::Status allowed = CheckJob(request_.job()); !allowed.ok()) return End(allowed);
  pull_.emplace(jobs_, request_);
  Advance();
}

void PullCall::Cancelled() {
  pending_->Cancel();
  built_->GiveUp();
}

void PullCall::Advance() { AdvanceWithin(kBuiltChunks); }

// Goes on when gRPC keeps fewer than `limit` built chunks.
void PullCall::AdvanceWithin(int limit) {
  BeginTransfer();  // to wait until a chunk is sent is to wait for the client
  const auto again = [this, limit] { Submit([this, limit] { AdvanceWithin(limit); }); };
  if (!built_->AreFewerThan(limit, again)) return;
  EndTransfer();
  const int kept = built_->count();
  absl::StatusOr<PullStream::Next> next = pull_->Advance();
  // A chunk that is sent gives back the memory for this one.
  if (absl::IsResourceExhausted(next.status()) && kept > 0 && !built_->has_ended())
    return AdvanceWithin(kept);
  if (!next.ok()) return End(next.status());
  switch (next->what) {
    case PullStream::Next::What::kChunk:
      message_ = EncodeChunk(next->header, SliceOf(next->chunk, built_));
      BeginTransfer();
      return StartWrite(&message_);
    case PullStream::Next::What::kVersion:
      return AskFor(next->shard, next->version);
    case PullStream::Next::What::kEnd:
      return End(absl::OkStatus());
  }
}

void PullCall::AskFor(int32_t shard, int64_t version) {
  const std::shared_ptr<JobRuntime> job = pull_->job();
  const std::shared_ptr<Pending> pending = pending_;  // the answer may end the call in here
  const int number = pending->Begin();
  const step::RequestId request = job->AskVersion(
      shard, version, deadline(), [this](absl::StatusOr<JobRuntime::VersionPin> pin) {
        // The task must be copyable, and a pin has one owner.
        const auto shared =
            std::make_shared<absl::StatusOr<JobRuntime::VersionPin>>(std::move(pin));
        Submit([this, shared] { Open(*shared); });
      });
  pending->Set(number, [job, request] {
    job->Withdraw(request, absl::CancelledError("the caller went away"));
  });
}

void PullCall::Open(const absl::StatusOr<JobRuntime::VersionPin>& pin) {
  // The room is not held while the version is awaited, which others may make.
  if (pin.ok())
    if (absl::Status room = read_room_.Grow(pull_->RoomBytes()); !room.ok()) return End(room);
  if (absl::Status status = pull_->Open(pin); !status.ok()) return End(status);
  Advance();
}

void PullCall::OnWriteDone(bool is_written) {
  TellTaken(this);
  EndTransfer();
  if (!is_written)
    return End(absl::CancelledError("the caller went away, or took nothing for too long"));
  message_.Clear();
  Submit([this] { Advance(); });
}

void PullCall::End(const absl::Status& status) { Finish(ToGrpc(status)); }

}  // namespace orlop::server
