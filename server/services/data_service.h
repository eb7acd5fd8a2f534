// The service v1::Data. Push, SetState and Pull exchange raw byte buffers, which hold chunks
// (proto/chunk.h), so that payloads are never copied into protobuf messages. The class therefore
// registers its methods itself, as generated code would.
//   Threads  one for each call in progress.
//   Status   as data.proto says.
//   Next     server/runtime/job_runtime.h
#pragma once

#include <grpcpp/grpcpp.h>

#include "orlop/v1/data.pb.h"
#include "server/lanes/stall_watch.h"
#include "server/memory/message_room.h"
#include "server/runtime/job_table.h"

namespace orlop::server {

class DataService : public grpc::Service {
 public:
  // `jobs` and `messages` must outlive the service.
  DataService(JobTable* jobs, MessageRoom* messages);

  // Cancels pulls whose caller has read nothing for kMaxStallMs. The server's ticker calls it.
  void Tick() { stalls_.Tick(); }

 private:
  grpc::Status Receive(grpc::ServerContext* context, bool is_load,
                       grpc::ServerReader<grpc::ByteBuffer>* stream, v1::PushResponse* response);
  grpc::Status Push(grpc::ServerContext* context, grpc::ServerReader<grpc::ByteBuffer>* stream,
                    v1::PushResponse* response);
  grpc::Status SetState(grpc::ServerContext* context, grpc::ServerReader<grpc::ByteBuffer>* stream,
                        v1::PushResponse* response);
  grpc::Status Pull(grpc::ServerContext* context, const v1::PullRequest* request,
                    grpc::ServerWriter<grpc::ByteBuffer>* stream);
  grpc::Status QueryPush(grpc::ServerContext* context, const v1::QueryPushRequest* request,
                         v1::QueryPushResponse* response);

  JobTable* const jobs_;
  MessageRoom* const messages_;
  StallWatch stalls_;
};

}  // namespace orlop::server
