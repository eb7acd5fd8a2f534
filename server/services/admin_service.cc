#include "server/services/admin_service.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "base/mutex.h"
#include "kernels/targets.h"
#include "kernels/types.h"
#include "orlop/v1/admin.grpc.pb.h"
#include "orlop/v1/admin.pb.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/cluster/peer_links.h"
#include "server/job/job_model.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/memory/process_memory.h"
#include "server/runtime/answers.h"
#include "server/runtime/environment.h"
#include "server/runtime/job_table.h"
#include "server/services/describe.h"
#include "server/services/gate.h"
#include "server/services/job_status.h"
#include "server/step/actions.h"

namespace orlop::server {
namespace {

// Whether a server did not answer when it was asked last. One that was not asked yet is not.
bool IsSilent(const PeerLinks::Seen& seen) {
  return !seen.status.ok() && seen.asked > seen.answered;
}

uint64_t SilentMs(const PeerLinks::Seen& seen) {
  const auto age = std::chrono::steady_clock::now() - seen.answered;
  return std::chrono::duration_cast<std::chrono::milliseconds>(age).count() + 1;
}

std::string HowSilent(const PeerLinks::Seen& seen) {
  return absl::StrCat("silent for ", SilentMs(seen) / 1000, " s: ", seen.status.message());
}

// Returns what ListServers says of another server.
v1::ServerInfo InfoOf(const PeerLinks::Seen& seen) {
  v1::ServerInfo info = seen.info;
  if (seen.status.ok()) return info;
  info.set_ready(false);
  info.set_silent_ms(SilentMs(seen));
  info.set_state(absl::StrCat("does not answer, ", HowSilent(seen)));
  return info;
}

// Makes the same call at the step leader, with the caller's deadline, and ends `call` with the
// leader's answer. If the leader is silent, ends it at once; if it was not there, soon, since one
// that has just come back is found by then.
template <typename Request, typename Response>
void Forward(
    Call* call, const Environment& environment,
    void (v1::Admin::StubInterface::async_interface::*method)(grpc::ClientContext*, const Request*,
                                                              Response*,
                                                              std::function<void(grpc::Status)>),
    const Request& request, Response* response,
    const std::function<void()>& when_answered = [] {}) {
  PeerLinks* peers = environment.peers;
  const auto forward = [=, &request](const PeerLinks::Seen& leader) {
    if (IsSilent(leader))
      return call->End(absl::UnavailableError(
          absl::StrCat("the step leader, server ", leader.info.name(), ", is ", HowSilent(leader),
                       "; ask again when it answers")));
    const std::shared_ptr<grpc::ClientContext> onward = call->Onward();
    (peers->admin(0)->async()->*method)(onward.get(), &request, response,
                                        [=](const grpc::Status& status) {
                                          (void)onward;  // outlives the call
                                          when_answered();
                                          call->End(FromGrpc(status));
                                        });
  };
  const PeerLinks::Seen leader = peers->LastSeen(0);
  if (!IsSilent(leader) || !absl::IsUnavailable(leader.status)) return forward(leader);
  peers->Look(0, forward, PeerLinks::kUntilConnected);
}

// The leader has answered this server, which may see every job; the caller may not.
void EraseHidden(const Call& call, v1::ListJobsResponse* response) {
  auto* jobs = response->mutable_jobs();
  jobs->erase(std::remove_if(jobs->begin(), jobs->end(),
                             [&](const auto& job) { return !call.MaySee(job.job()); }),
              jobs->end());
}

// A DescribeTensor under way: the page of shards that was asked for, from their owners.
struct Describing {
  std::shared_ptr<const JobModel> model;
  uint32_t tensor = 0;
  uint64_t first = 0, end = 0;  // of the page
  v1::DescribeTensorRequest request;
  Mutex mutex;
  int left GUARDED_BY(mutex) = 0;  // owners that have not answered
  std::map<uint64_t, v1::ShardDescription> shards GUARDED_BY(mutex);
  std::map<int, absl::Status> failed GUARDED_BY(mutex);

  int OwnerOf(uint64_t shard) const {
    return model->Owner(model->FirstShard(tensor) + static_cast<int32_t>(shard));
  }
  // Adds the answer of an owner. Returns whether it was the last.
  bool Add(int owner, absl::StatusOr<v1::DescribeTensorResponse> part) {
    MutexLock lock(&mutex);
    if (!part.ok()) failed[owner] = part.status();
    if (part.ok()) {
      for (v1::ShardDescription& shard : *part->mutable_shards()) {
        const uint64_t number = shard.shard();
        if (number >= first && number < end) shards[number] = std::move(shard);
      }
    }
    return --left == 0;
  }
};

// Returns what is known of a shard whose owner does not answer.
v1::ShardDescription LostShard(const Describing& page, uint64_t shard, const std::string& owner,
                               const absl::Status& why) {
  const JobModel& model = *page.model;
  const Range range =
      ShardRange(shard, model.tensors()[page.tensor].element_count, model.shard_elements());
  v1::ShardDescription lost;
  lost.set_shard(shard);
  lost.set_first_element(range.begin);
  lost.set_element_count(range.count());
  lost.add_copies(owner);
  lost.set_reason(model.ReasonOf(model.FirstShard(page.tensor) + static_cast<int32_t>(shard)));
  lost.set_error(std::string(why.message()));
  return lost;
}

// Adds to a refused rollback which step can be accepted.
absl::Status ExplainRollback(JobRuntime* job, const std::string& name,
                             const absl::Status& refusal) {
  const absl::Status status = WithPosition(refusal, job->leader()->Status().position, name);
  v1::ErrorDetail detail = DetailOf(status);
  const v1::JobStatusResponse now = StatusOf(job);
  if (now.has_rollback_step()) {
    detail.set_limit(absl::StrCat(now.rollback_step()));
    detail.set_version(now.rollback_step());
    detail.set_reason(v1::ErrorDetail::ROLLBACK_OFFERED);
  } else if (now.state() == v1::JobStatusResponse::LOST) {
    detail.set_reason(v1::ErrorDetail::LOST);
  }
  return MakeError(status.code(), absl::StrCat("job '", name, "': ", status.message()), detail);
}

}  // namespace

void AdminService::ListServers(Call* call, const v1::ListServersRequest& request,
                               v1::ListServersResponse* response) {
  const Environment& environment = jobs_->environment();
  std::shared_ptr<const JobModel> model;
  if (!request.job().empty()) {
    absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->Find(request.job());
    if (!job.ok()) return call->End(job.status());
    model = (*job)->model();
    response->mutable_placement()->set_epoch(static_cast<uint64_t>((*job)->position().epoch));
  }
  uint64_t next = 0;
  FillPlacement(*jobs_, model.get(), 0, response->mutable_placement(), &next);
  response->set_next_placement_run(next);
  // All servers are asked at once. One that was silent before is not waited for.
  const auto left = std::make_shared<std::atomic<int>>(1);
  const auto finish = [call, left] {
    if (--*left == 0) call->End(absl::OkStatus());
  };
  for (int i = 0; i < response->placement().servers_size(); ++i) {
    v1::ServerInfo* info = response->mutable_placement()->mutable_servers(i);
    if (i == environment.self) {
      *info = identity_();
    } else if (const PeerLinks::Seen seen = environment.peers->LastSeen(i); IsSilent(seen)) {
      *info = InfoOf(seen);
    } else {
      ++*left;
      environment.peers->Look(i, [info, finish](const PeerLinks::Seen& answer) {
        *info = InfoOf(answer);
        finish();
      });
    }
  }
  finish();
}

void AdminService::ListJobs(Call* call, const v1::ListJobsRequest& request,
                            v1::ListJobsResponse* response) {
  if (!jobs_->environment().is_leader()) {
    return Forward(call, jobs_->environment(), &v1::Admin::StubInterface::async_interface::ListJobs,
                   request, response, [=] { EraseHidden(*call, response); });
  }
  if (absl::Status status = jobs_->CheckLeader(); !status.ok()) return call->End(status);
  for (const std::shared_ptr<JobRuntime>& job : jobs_->List())
    if (call->MaySee(job->model()->job())) *response->add_jobs() = StatusOf(job.get());
  for (const auto& [job, why] : jobs_->Quarantined())
    if (call->MaySee(job)) *response->add_jobs() = StatusOf(job, why);
  call->End(absl::OkStatus());
}

absl::Status AdminService::ListTensors(const v1::ListTensorsRequest& request,
                                       v1::ListTensorsResponse* response) {
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->Find(request.job());
  if (!job.ok()) return job.status();
  const std::shared_ptr<const JobModel> model = (*job)->model();
  const std::vector<TensorOptimizer> optimizers = model->Optimizers();
  for (uint64_t t = request.first(); t < model->tensors().size(); ++t) {
    if (!absl::StrContains(model->tensors()[t].name, request.name_contains())) continue;
    if (response->tensors_size() == static_cast<int>(kMaxTensorsPerPage)) {
      response->set_next(t);
      break;
    }
    *response->add_tensors() = Summary(job->get(), *model, optimizers, static_cast<uint32_t>(t));
  }
  return absl::OkStatus();
}

void AdminService::DescribeTensor(Call* call, const v1::DescribeTensorRequest& request,
                                  v1::DescribeTensorResponse* response) {
  const absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->Find(request.job());
  if (!job.ok()) return call->End(job.status());
  const auto page = std::make_shared<Describing>();
  page->model = (*job)->model();
  const absl::StatusOr<uint32_t> tensor = page->model->FindTensor(request.tensor());
  if (!tensor.ok()) return call->End(tensor.status());
  *response->mutable_summary() =
      Summary(job->get(), *page->model, page->model->Optimizers(), *tensor);
  const uint64_t count = page->model->ShardCountOf(*tensor);
  page->tensor = *tensor;
  page->first = std::min(request.first_shard(), count);
  page->end = std::min<uint64_t>(count, page->first + kMaxShardsPerPage);
  page->request = request;
  if (page->end < count) response->set_next_shard(page->end);
  const Environment& environment = jobs_->environment();
  std::set<int> owners;
  for (uint64_t s = page->first; s < page->end; ++s) owners.insert(page->OwnerOf(s));
  if (owners.empty()) return call->End(absl::OkStatus());
  {
    MutexLock lock(&page->mutex);
    page->left = static_cast<int>(owners.size());
  }
  const auto take = [=, &environment](int owner, absl::StatusOr<v1::DescribeTensorResponse> part) {
    if (!page->Add(owner, std::move(part))) return;
    MutexLock lock(&page->mutex);
    for (uint64_t s = page->first; s < page->end; ++s) {
      const int of = page->OwnerOf(s);
      if (const auto failed = page->failed.find(of); failed != page->failed.end())
        page->shards[s] = LostShard(*page, s, environment.server_names[of], failed->second);
    }
    for (auto& [number, shard] : page->shards) *response->add_shards() = std::move(shard);
    call->End(absl::OkStatus());
  };
  for (const int owner : owners) {
    if (owner == environment.self) {
      take(owner, DescribeHere(*jobs_, page->request));
    } else {
      environment.peers->DescribeShards(
          owner, page->request, [take, owner](absl::StatusOr<v1::DescribeTensorResponse> part) {
            take(owner, std::move(part));
          });
    }
  }
}

void AdminService::ServerStatus(Call* call, const v1::ServerStatusRequest&,
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
  response->set_disk_free_bytes(jobs_->environment().data->FreeBytes().value_or(0));
  std::map<std::string, uint64_t> missing;
  for (const std::shared_ptr<JobRuntime>& job : jobs_->List())
    missing[job->model()->job()] = job->missing_flush_bytes();
  // The sums are of the same moment as their parts.
  uint64_t used_bytes = 0, reserved_bytes = 0;
  for (const UsedBytes& used : accountant_->Snapshot()) {
    if (used.use.tier == Tier::kDram) {
      used_bytes += used.used_bytes;
      reserved_bytes += used.reserved_bytes;
    }
    if (!used.use.job.empty() && !call->MaySee(used.use.job)) continue;
    v1::UseOfBytes* use = response->add_uses();
    use->set_tier(TierName(used.use.tier));
    use->set_job(used.use.job);
    use->set_slot(used.use.slot);
    use->set_bytes(used.used_bytes);
    use->set_reserved_bytes(used.reserved_bytes);
    use->set_peak_bytes(used.peak_bytes);
    if (used.use.slot == "flush") use->set_missing_bytes(missing[used.use.job]);
  }
  response->set_memory_bytes(used_bytes);
  response->set_memory_peak_bytes(accountant_->peak_bytes(Tier::kDram));
  response->set_memory_reserved_bytes(reserved_bytes);
  response->set_idle_bytes(accountant_->idle_bytes());
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
  call->End(absl::OkStatus());
}

void AdminService::AcceptRollback(Call* call, const v1::AcceptRollbackRequest& request,
                                  v1::AcceptRollbackResponse* response) {
  if (!jobs_->environment().is_leader()) {
    return Forward(call, jobs_->environment(),
                   &v1::Admin::StubInterface::async_interface::AcceptRollback, request, response);
  }
  const absl::StatusOr<std::shared_ptr<JobRuntime>> found = jobs_->FindOnLeader(request.job());
  if (!found.ok()) return call->End(found.status());
  call->Ask(
      *found,
      [&](LeaderShell& leader, Caller caller) {
        return leader.AcceptRollback(request.to_step(), std::move(caller));
      },
      [=, &request, job = *found](const absl::StatusOr<step::Answer>& answer) {
        if (!answer.ok())
          return call->End(ExplainRollback(job.get(), request.job(), answer.status()));
        response->set_committed_step(answer->position.committed_step);
        response->set_epoch(static_cast<uint64_t>(answer->position.epoch));
        call->End(absl::OkStatus());
      });
}

void AdminService::FlushJob(Call* call, const v1::FlushJobRequest& request,
                            v1::FlushJobResponse* response) {
  if (!jobs_->environment().is_leader()) {
    return Forward(call, jobs_->environment(), &v1::Admin::StubInterface::async_interface::FlushJob,
                   request, response);
  }
  const absl::StatusOr<std::shared_ptr<JobRuntime>> found = jobs_->FindOnLeader(request.job());
  if (!found.ok()) return call->End(found.status());
  if (absl::Status lost = CheckMemory(found->get()); !lost.ok()) return call->End(lost);
  call->Ask(
      *found, [](LeaderShell& leader, Caller caller) { return leader.Flush(std::move(caller)); },
      [=, &request, job = *found](const absl::StatusOr<step::Answer>& answer) {
        if (!answer.ok()) {
          const absl::Status status =
              WithPosition(answer.status(), job->leader()->Status().position, request.job());
          return call->End(Annotated(status, absl::StrCat("job '", request.job(), "'")));
        }
        response->set_step(answer->position.committed_step);
        response->set_epoch(static_cast<uint64_t>(answer->position.epoch));
        call->End(absl::OkStatus());
      });
}

void AdminService::AddTo(Rpcs* rpcs) {
  rpcs->Add("/orlop.v1.Admin/ListServers", this, &AdminService::ListServers);
  rpcs->Add("/orlop.v1.Admin/ListJobs", this, &AdminService::ListJobs);
  rpcs->Add("/orlop.v1.Admin/ListTensors", this, &AdminService::ListTensors);
  rpcs->Add("/orlop.v1.Admin/DescribeTensor", this, &AdminService::DescribeTensor);
  rpcs->Add("/orlop.v1.Admin/ServerStatus", this, &AdminService::ServerStatus);
  rpcs->Add("/orlop.v1.Admin/AcceptRollback", this, &AdminService::AcceptRollback);
  rpcs->Add("/orlop.v1.Admin/FlushJob", this, &AdminService::FlushJob);
}

}  // namespace orlop::server
