#include "server/services/peer_service.h"

#include "absl/strings/str_cat.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/job/step_codec.h"

namespace orlop::server {

absl::StatusOr<v1::DescribeTensorResponse> DescribeHere(const JobTable& jobs,
                                                        const v1::DescribeTensorRequest& request) {
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs.Find(request.job());
  if (!job.ok()) return job.status();
  const std::shared_ptr<const JobModel> model = (*job)->model();
  absl::StatusOr<uint32_t> tensor = model->FindTensor(request.tensor());
  if (!tensor.ok()) return tensor.status();
  v1::DescribeTensorResponse response;
  const uint64_t end =
      std::min<uint64_t>(model->ShardCountOf(*tensor), request.first_shard() + kMaxShardsPerPage);
  for (uint64_t s = request.first_shard(); s < end; ++s) {
    const int32_t id = model->FirstShard(*tensor) + static_cast<int32_t>(s);
    if (model->Owner(id) != jobs.environment().self) continue;
    absl::StatusOr<ShardStatus> status = (*job)->shards().Describe(id);
    if (!status.ok()) return status.status();
    v1::ShardDescription* out = response.add_shards();
    out->set_shard(s);
    out->set_first_element(status->shard.range.begin);
    out->set_element_count(status->shard.range.count());
    out->add_copies(jobs.environment().server_names[jobs.environment().self]);
    out->set_version(status->version);
    out->set_reason(model->ReasonOf(id));
    out->set_stage(status->stage);
    for (const SlotStatus& slot : status->slots) {
      v1::SlotBytes* bytes = out->add_slots();
      bytes->set_slot(SlotName(slot.slot));
      bytes->set_dtype(slot.dtype);
      bytes->set_tier(TierName(slot.tier));
      bytes->set_bytes(slot.bytes);
    }
  }
  return response;
}

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
  (*job)->OnPeer(static_cast<int>(request->from()), *message);
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
