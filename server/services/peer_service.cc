#include "server/services/peer_service.h"

#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "orlop/v1/admin.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/job/step_codec.h"
#include "server/runtime/job_table.h"
#include "server/services/describe.h"
#include "server/step/messages.h"

namespace orlop::server {

grpc::Status PeerService::PutJob(grpc::ServerContext*, const v1::JobDefinition* request,
                                 v1::PutJobResponse*) {
  return ToGrpc(jobs_->Put(*request));
}

grpc::Status PeerService::DropJob(grpc::ServerContext*, const v1::DropJobRequest* request,
                                  v1::DropJobResponse* response) {
  bool existed = false;
  const absl::Status status = jobs_->Drop(request->job(), &existed);
  response->set_existed(existed);
  return ToGrpc(status);
}

grpc::Status PeerService::Step(grpc::ServerContext*, const v1::StepMessage* request, v1::StepAck*) {
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->Find(request->job());
  if (!job.ok()) return ToGrpc(job.status());
  if (request->from() >= jobs_->environment().server_names.size()) {
    return ToGrpc(absl::InvalidArgumentError(
        absl::StrCat("no server ", request->from(), " in --peers: are the lists the same?")));
  }
  absl::StatusOr<step::Message> message = ToStep(*request);
  if (!message.ok()) return ToGrpc(message.status());
  (*job)->OnMessage(static_cast<int>(request->from()), *message);
  return grpc::Status::OK;
}

grpc::Status PeerService::Identify(grpc::ServerContext*, const v1::IdentifyRequest*,
                                   v1::ServerInfo* response) {
  *response = identity_();
  return grpc::Status::OK;
}

grpc::Status PeerService::DescribeShards(grpc::ServerContext*,
                                         const v1::DescribeTensorRequest* request,
                                         v1::DescribeTensorResponse* response) {
  absl::StatusOr<v1::DescribeTensorResponse> here = DescribeHere(*jobs_, *request);
  if (!here.ok()) return ToGrpc(here.status());
  *response = *std::move(here);
  return grpc::Status::OK;
}

}  // namespace orlop::server
