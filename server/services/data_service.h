// The data plane. Push, SetState and Pull speak raw byte buffers, so that payloads are never copied
// into protobuf: the methods are registered here as generated code does it, with chunks
// (proto/chunk.h) as messages.
//   Threads  one per call in progress.
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
  // Both must outlive it.
  DataService(JobTable* jobs, MessageRoom* messages);

  void Tick() { stalls_.Tick(); }  // ends pulls that nobody takes

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
