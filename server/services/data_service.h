// The service v1::Data. Push, SetState and Pull exchange raw byte buffers, which hold chunks
// (proto/chunk.h), so that payloads are never copied into protobuf messages.
//   Threads  a call that waits for its client or for its job holds none.
//   Status   as data.proto says.
//   Next     server/services/push_call.h, server/services/pull_call.h
#pragma once

#include "orlop/v1/data.pb.h"
#include "server/memory/message_room.h"
#include "server/memory/read_room.h"
#include "server/runtime/job_table.h"
#include "server/services/gate.h"

namespace orlop::server {

class DataService final {
 public:
  // All must outlive the service.
  DataService(JobTable* jobs, MessageRoom* messages, ReadRoom* reads)
      : jobs_(jobs), messages_(messages), reads_(reads) {}

  // Adds the RPCs of the service, which must outlive `rpcs`.
  void AddTo(Rpcs* rpcs);

 private:
  void QueryPush(Call* call, const v1::QueryPushRequest& request, v1::QueryPushResponse* response);

  JobTable* const jobs_;
  MessageRoom* const messages_;
  ReadRoom* const reads_;
};

}  // namespace orlop::server
