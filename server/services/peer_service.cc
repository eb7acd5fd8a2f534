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
#include "server/services/gate.h"
#include "server/step/messages.h"

namespace orlop::server {

absl::Status PeerService::PutJob(const v1::JobDefinition& request, v1::PutJobResponse*) {
  return jobs_->Put(request);
}

absl::Status PeerService::DropJob(const v1::DropJobRequest& request,
                                  v1::DropJobResponse* response) {
  bool existed = false;
  const absl::Status status = jobs_->Drop(request.job(), &existed);
  response->set_existed(existed);
  return status;
}

absl::Status PeerService::Step(const v1::StepMessage& request, v1::StepAck*) {
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->Find(request.job());
  if (!job.ok()) return job.status();
  if (request.from() >= jobs_->environment().server_names.size()) {
    return MakeError(absl::StatusCode::kInvalidArgument,
                     absl::StrCat("no server ", request.from(),
                                  " in --peers, so it is no sender: are the lists the same?"),
                     v1::ErrorDetail::BAD_REQUEST);
  }
  absl::StatusOr<step::Message> message = ToStep(request);
  if (!message.ok()) return message.status();
  return (*job)->OnPeerMessage(static_cast<int>(request.from()), *message);
}

absl::Status PeerService::Identify(const v1::IdentifyRequest&, v1::ServerInfo* response) {
  *response = identity_();
  return absl::OkStatus();
}

absl::Status PeerService::DescribeShards(const v1::DescribeTensorRequest& request,
                                         v1::DescribeTensorResponse* response) {
  absl::StatusOr<v1::DescribeTensorResponse> here = DescribeHere(*jobs_, request);
  if (!here.ok()) return here.status();
  *response = *std::move(here);
  return absl::OkStatus();
}

void PeerService::AddTo(Rpcs* rpcs) {
  rpcs->Add("/orlop.v1.Peer/PutJob", this, &PeerService::PutJob);
  rpcs->Add("/orlop.v1.Peer/DropJob", this, &PeerService::DropJob);
  rpcs->Add("/orlop.v1.Peer/Step", this, &PeerService::Step);
  rpcs->Add("/orlop.v1.Peer/Identify", this, &PeerService::Identify);
  rpcs->Add("/orlop.v1.Peer/DescribeShards", this, &PeerService::DescribeShards);
}

}  // namespace orlop::server
