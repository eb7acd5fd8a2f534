// One call of Data.Push or Data.SetState: it reads the chunks of the client, one at a time, and
// stages them.
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include <optional>

#include "absl/status/status.h"
#include "proto/chunk.h"
#include "server/lanes/push_stream.h"
#include "server/memory/message_room.h"
#include "server/services/gate.h"

namespace orlop::server {

class PushCall final : public StreamCall {
 public:
  // `jobs` and `messages` must outlive the call. `is_load`: SetState.
  PushCall(Gate* gate, grpc::GenericCallbackServerContext* context, JobTable* jobs,
           MessageRoom* messages, bool is_load);

 private:
  void Read();
  void OnReadDone(bool is_read) override;
  void Take();
  bool TryToTake(const std::shared_ptr<Wakeup>& wakeup, bool is_last);
  void Finish();
  void End(const absl::Status& status);

  MessageRoom* const messages_;
  PushStream push_;
  grpc::ByteBuffer message_;           // the one that is read, then taken; at last the response
  std::optional<DecodedChunk> chunk_;  // in message_
};

}  // namespace orlop::server
