#include "server/services/admin_service.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "kernels/targets.h"
#include "kernels/types.h"
#include "orlop/v1/admin.grpc.pb.h"
#include "orlop/v1/admin.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/job/job_model.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/memory/process_memory.h"
#include "server/runtime/answers.h"
#include "server/runtime/environment.h"
#include "server/runtime/job_table.h"
#include "server/services/describe.h"
#include "server/services/job_status.h"
#include "server/step/actions.h"

namespace orlop::server {
namespace {

// Forwards a call to the step leader, with the caller's deadline.
template <typename Request, typename Response>
grpc::Status Forward(grpc::ServerContext* context, const Environment& environment,
                     grpc::Status (v1::Admin::Stub::*method)(grpc::ClientContext*, const Request&,
                                                             Response*),
                     const Request& request, Response* response) {
  std::unique_ptr<grpc::ClientContext> onward = grpc::ClientContext::FromServerContext(*context);
  return (environment.peers->admin(0)->*method)(onward.get(), request, response);
}

}  // namespace

grpc::Status AdminService::ListServers(grpc::ServerContext* context,
                                       const v1::ListServersRequest* request,
                                       v1::ListServersResponse* response) {
  const Environment& environment = jobs_->environment();
  if (!environment.is_leader())
    return Forward(context, environment, &v1::Admin::Stub::ListServers, *request, response);
  std::shared_ptr<const JobModel> model;
  if (!request->job().empty()) {
    absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->Find(request->job());
    if (!job.ok()) return ToGrpc(job.status());
    model = (*job)->model();
    response->mutable_placement()->set_epoch(
        static_cast<uint64_t>((*job)->leader()->Status().position.epoch));
  }
  uint64_t next = 0;
  FillPlacement(*jobs_, model.get(), 0, response->mutable_placement(), &next);
  response->set_next_placement_run(next);
  for (int i = 0; i < response->placement().servers_size(); ++i) {
    v1::ServerInfo* info = response->mutable_placement()->mutable_servers(i);
    if (i == environment.self) {
      *info = identity_();
    } else if (absl::StatusOr<v1::ServerInfo> other = environment.peers->Identify(i); other.ok()) {
      *info = *std::move(other);
    } else {
      info->set_ready(false);
      info->set_state(absl::StrCat("does not answer: ", std::string(other.status().message())));
    }
  }
  return grpc::Status::OK;
}

grpc::Status AdminService::ListJobs(grpc::ServerContext* context,
                                    const v1::ListJobsRequest* request,
                                    v1::ListJobsResponse* response) {
  if (!jobs_->environment().is_leader()) {
    return Forward(context, jobs_->environment(), &v1::Admin::Stub::ListJobs, *request, response);
  }
  if (absl::Status status = jobs_->CheckLeader(); !status.ok()) return ToGrpc(status);
  for (const std::shared_ptr<JobRuntime>& job : jobs_->List())
    *response->add_jobs() = StatusOf(job.get());
  return grpc::Status::OK;
}

grpc::Status AdminService::ListTensors(grpc::ServerContext* context,
                                       const v1::ListTensorsRequest* request,
                                       v1::ListTensorsResponse* response) {
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->Find(request->job());
  if (!job.ok()) return ToGrpc(job.status());
  const std::shared_ptr<const JobModel> model = (*job)->model();
  const std::vector<TensorOptimizer> optimizers = model->Optimizers();
  for (uint64_t t = request->first(); t < model->tensors().size(); ++t) {
    if (!absl::StrContains(model->tensors()[t].name, request->name_contains())) continue;
    if (response->tensors_size() == static_cast<int>(kMaxTensorsPerPage)) {
      response->set_next(t);
      break;
    }
    *response->add_tensors() = Summary(job->get(), *model, optimizers, static_cast<uint32_t>(t));
  }
  return grpc::Status::OK;
}

grpc::Status AdminService::DescribeTensor(grpc::ServerContext*,
                                          const v1::DescribeTensorRequest* request,
                                          v1::DescribeTensorResponse* response) {
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->Find(request->job());
  if (!job.ok()) return ToGrpc(job.status());
  const std::shared_ptr<const JobModel> model = (*job)->model();
  absl::StatusOr<uint32_t> tensor = model->FindTensor(request->tensor());
  if (!tensor.ok()) return ToGrpc(tensor.status());
  *response->mutable_summary() = Summary(job->get(), *model, model->Optimizers(), *tensor);
  const Environment& environment = jobs_->environment();
  const uint64_t end =
      std::min<uint64_t>(model->ShardCountOf(*tensor), request->first_shard() + kMaxShardsPerPage);
  if (end < model->ShardCountOf(*tensor)) response->set_next_shard(end);
  std::map<uint64_t, v1::ShardDescription> shards;
  std::map<int, absl::Status> asked;
  for (uint64_t s = request->first_shard(); s < end; ++s) {
    const int32_t id = model->FirstShard(*tensor) + static_cast<int32_t>(s);
    const int owner = model->Owner(id);
    if (!asked.contains(owner)) {
      auto part = owner == environment.self ? DescribeHere(*jobs_, *request)
                                            : environment.peers->DescribeShards(owner, *request);
      asked[owner] = part.status();
      if (part.ok()) {
        for (v1::ShardDescription& shard : *part->mutable_shards())
          shards[shard.shard()] = std::move(shard);
      }
    }
    if (asked[owner].ok()) continue;
    const Range range =
        ShardRange(s, model->tensors()[*tensor].element_count, model->shard_elements());
    v1::ShardDescription& lost = shards[s];
    lost.set_shard(s);
    lost.set_first_element(range.begin);
    lost.set_element_count(range.count());
    lost.add_copies(environment.server_names[owner]);
    lost.set_reason(model->ReasonOf(id));
    lost.set_error(std::string(asked[owner].message()));
  }
  for (auto& [index, shard] : shards) *response->add_shards() = std::move(shard);
  return grpc::Status::OK;
}

grpc::Status AdminService::ServerStatus(grpc::ServerContext*, const v1::ServerStatusRequest*,
                                        v1::ServerStatusResponse* response) {
  const v1::ServerInfo identity = identity_();
  const ServerFacts facts = facts_();
  response->set_name(identity.name());
  response->set_version(ORLOP_VERSION);
  response->set_arithmetic_version(kernels::kArithmeticVersion);
  response->set_incarnation(identity.incarnation());
  response->set_ready(identity.ready());
  response->set_state(identity.state());
  response->set_uptime_seconds(
      std::chrono::duration<double>(std::chrono::steady_clock::now() - facts.started).count());
  response->set_memory_budget_bytes(accountant_->limit_bytes(Tier::kDram));
  response->set_memory_bytes(accountant_->used_bytes(Tier::kDram));
  response->set_memory_peak_bytes(accountant_->peak_bytes(Tier::kDram));
  response->set_memory_reserved_bytes(accountant_->reserved_bytes(Tier::kDram));
  response->set_disk_free_bytes(jobs_->environment().data->FreeBytes().value_or(0));
  for (const UsedBytes& used : accountant_->Snapshot()) {
    v1::UseOfBytes* use = response->add_uses();
    use->set_tier(TierName(used.use.tier));
    use->set_job(used.use.job);
    use->set_slot(used.use.slot);
    use->set_bytes(used.used_bytes);
    use->set_reserved_bytes(used.reserved_bytes);
    use->set_peak_bytes(used.peak_bytes);
  }
  response->set_baseline_bytes(facts.baseline_bytes);
  response->set_resident_bytes(ResidentBytes());
  response->set_instruction_set(kernels::TargetName(kernels::SupportedTargets().front()));
  response->set_data_dir(facts.data_dir);
  for (const std::shared_ptr<JobRuntime>& job : jobs_->List()) {
    response->set_epoch(std::max(response->epoch(), static_cast<uint64_t>(job->position().epoch)));
    const StepTimes times = job->last_step();
    if (times.step < 0 || times.step < response->last_step().step()) continue;
    response->mutable_last_step()->set_step(times.step);
    response->mutable_last_step()->set_stage_seconds(times.stage_seconds);
    response->mutable_last_step()->set_decide_seconds(times.decide_seconds);
    response->mutable_last_step()->set_apply_seconds(times.apply_seconds);
  }
  return grpc::Status::OK;
}

grpc::Status AdminService::AcceptRollback(grpc::ServerContext* context,
                                          const v1::AcceptRollbackRequest* request,
                                          v1::AcceptRollbackResponse* response) {
  if (!jobs_->environment().is_leader()) {
    return Forward(context, jobs_->environment(), &v1::Admin::Stub::AcceptRollback, *request,
                   response);
  }
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->FindOnLeader(request->job());
  if (!job.ok()) return ToGrpc(job.status());
  LeaderShell& leader = *(*job)->leader();
  absl::StatusOr<step::Answer> answer = leader.Await(WaitOf(context), [&](Caller caller) {
    return leader.AcceptRollback(request->to_step(), std::move(caller));
  });
  if (!answer.ok()) {
    absl::Status status = WithPosition(answer.status(), leader.Status().position, request->job());
    v1::ErrorDetail detail = DetailOf(status);
    const v1::JobStatusResponse now = StatusOf(job->get());
    if (now.has_rollback_step()) {
      detail.set_limit(absl::StrCat(now.rollback_step()));
      detail.set_version(now.rollback_step());
      detail.set_reason(v1::ErrorDetail::ROLLBACK_OFFERED);
    } else if (now.state() == v1::JobStatusResponse::LOST) {
      detail.set_reason(v1::ErrorDetail::LOST);
    }
    return ToGrpc(MakeError(
        status.code(), absl::StrCat("job '", request->job(), "': ", status.message()), detail));
  }
  response->set_committed_step(answer->position.committed_step);
  response->set_epoch(static_cast<uint64_t>(answer->position.epoch));
  return grpc::Status::OK;
}

grpc::Status AdminService::FlushJob(grpc::ServerContext* context,
                                    const v1::FlushJobRequest* request,
                                    v1::FlushJobResponse* response) {
  if (!jobs_->environment().is_leader())
    return Forward(context, jobs_->environment(), &v1::Admin::Stub::FlushJob, *request, response);
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->FindOnLeader(request->job());
  if (!job.ok()) return ToGrpc(job.status());
  if (absl::Status lost = CheckMemory(job->get()); !lost.ok()) return ToGrpc(lost);
  LeaderShell& leader = *(*job)->leader();
  absl::StatusOr<step::Answer> answer =
      leader.Await(WaitOf(context), [&](Caller caller) { return leader.Flush(std::move(caller)); });
  if (!answer.ok()) {
    const absl::Status status =
        WithPosition(answer.status(), leader.Status().position, request->job());
    return ToGrpc(Annotated(status, absl::StrCat("job '", request->job(), "'")));
  }
  response->set_step(answer->position.committed_step);
  response->set_epoch(static_cast<uint64_t>(answer->position.epoch));
  return grpc::Status::OK;
}

}  // namespace orlop::server
