#include "server/services/push_call.h"

#include <grpcpp/support/byte_buffer.h>

#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/handover.h"
#include "orlop/v1/types.pb.h"
#include "proto/chunk.h"
#include "proto/status.h"
#include "server/lanes/push_stream.h"
#include "server/lanes/region.h"
#include "server/memory/message_room.h"
#include "server/runtime/job_table.h"
#include "server/runtime/wait.h"
#include "server/services/gate.h"
#include "server/services/patience.h"

namespace orlop::server {

PushCall::PushCall(Gate* gate, grpc::GenericCallbackServerContext* context, JobTable* jobs,
                   MessageRoom* messages, bool is_load)
    : StreamCall(gate, context),
      messages_(messages),
      push_(jobs, is_load, {deadline(), [this] { return IsCancelled(); }}) {
  Read();
}

void PushCall::Read() {
  message_.Clear();
  BeginTransfer();
  StartRead(&message_);
}

void PushCall::OnReadDone(bool is_read) {
  TellTaken(this);
  EndTransfer();
  Submit([this, is_read] { is_read ? Take() : Finish(); });
}

void PushCall::Take() {
  absl::StatusOr<DecodedChunk> chunk = DecodeChunk(message_);
  if (!chunk.ok())
    return End(MakeError(chunk.status().code(), std::string(chunk.status().message()),
                         v1::ErrorDetail::BAD_REQUEST));
  if (chunk->header.has_key())
    if (absl::Status allowed = CheckJob(chunk->header.key().job()); !allowed.ok())
      return End(allowed);
  chunk_ = *std::move(chunk);
  Patience::Begin(gate().stream_threads(), ForAnAttempt({deadline(), nullptr}).deadline,
                  [this](const std::shared_ptr<Wakeup>& wakeup, bool is_last) {
                    return TryToTake(wakeup, is_last);
                  });
}

// Returns whether the chunk was taken or refused.
bool PushCall::TryToTake(const std::shared_ptr<Wakeup>& wakeup, bool is_last) {
  PushStream::Taken taken;
  {
    const MessageRoom::Held held(messages_, message_.Length());
    taken = push_.Take(*chunk_, wakeup);
  }
  if (taken.is_later && !is_last) return false;
  chunk_.reset();
  if (taken.status.ok()) {
    Read();
  } else {
    End(taken.status);
  }
  return true;
}

void PushCall::Finish() {
  if (IsCancelled()) return End(absl::CancelledError("the caller went away, or sent nothing"));
  if (absl::Status status = push_.Finish(); !status.ok()) return End(status);
  message_ = Serialized(push_.response());
  StartWriteAndFinish(&message_);
}

void PushCall::End(const absl::Status& status) { StreamCall::Finish(ToGrpc(status)); }

}  // namespace orlop::server
