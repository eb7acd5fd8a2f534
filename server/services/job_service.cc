#include "server/services/job_service.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/convert.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/cluster/placement.h"
#include "server/job/contributions.h"
#include "server/job/job_model.h"
#include "server/job/manifest.h"
#include "server/job/optimizer_config.h"
#include "server/runtime/answers.h"
#include "server/runtime/job_table.h"
#include "server/runtime/step_scalars.h"
#include "server/runtime/wait.h"
#include "server/services/gate.h"
#include "server/services/job_status.h"
#include "server/step/actions.h"
#include "server/step/layout.h"
#include "server/step/leader.h"
#include "server/step/reason.h"

namespace orlop::server {
namespace {

constexpr size_t kManifestPageBytes = 1 << 20;
constexpr int kConfigureTries = 40;  // 50 ms apart

absl::Status Refuse(absl::StatusCode code, const std::string& message,
                    v1::ErrorDetail::Reason reason) {
  return MakeError(code, message, reason);
}

// Refuses a loss scale other than 1 if an optimizer takes weights in place of gradients: no loss
// scales weights.
absl::Status CheckUnscaled(const JobModel& model, double loss_scale) {
  const int group = GroupThatTakesWeights(model.definition().optimizer());
  if (group < 0 || loss_scale == 1) return absl::OkStatus();
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::BAD_REQUEST);
  detail.set_field("loss_scale");
  detail.set_actual(absl::StrCat(loss_scale));
  detail.set_limit("1");
  return MakeError(
      absl::StatusCode::kInvalidArgument,
      absl::StrCat("loss_scale is ", loss_scale, ", but group ", group, " of job '", model.job(),
                   "' has optimizer '", model.definition().optimizer().groups(group).optimizer(),
                   "', which takes weights: 1"),
      detail);
}

// Returns whether two manifests are equal but for where tensors are placed and whether they may be
// unset.
bool SameButPlacement(v1::CreateJobRequest asked, const v1::CreateJobRequest& existing) {
  if (asked.tensors_size() != existing.tensors_size()) return false;
  for (int t = 0; t < asked.tensors_size(); ++t) {
    asked.mutable_tensors(t)->set_whole(existing.tensors(t).whole());
    asked.mutable_tensors(t)->set_may_be_unset(existing.tensors(t).may_be_unset());
    asked.mutable_tensors(t)->set_value_digest(existing.tensors(t).value_digest());
  }
  return ManifestDigest(asked) == ManifestDigest(existing);
}

bool SameOptimizer(const v1::ConfigureOptimizerRequest& a, const v1::ConfigureOptimizerRequest& b) {
  return a.SerializeAsString() == b.SerializeAsString();
}

}  // namespace

// ---- Manifest ----------------------------------------------------------------------------------

// Runs a task after those of other definitions. Ends the call instead if its client has gone
// meanwhile, because a server that hangs may have kept it for long.
void JobService::Define(Call* call, std::function<void()> task) {
  definitions_.Submit([call, task = std::move(task)] {
    if (call->IsCancelled()) return call->End(absl::CancelledError("the caller went away"));
    task();
  });
}

// Finds the job that a manifest describes, or creates it. Waits for the other servers.
absl::StatusOr<std::shared_ptr<JobRuntime>> JobService::FindOrCreate(
    const v1::CreateJobRequest& manifest) {
  absl::StatusOr<std::shared_ptr<JobRuntime>> found = jobs_->Find(manifest.job());
  if (!absl::IsNotFound(found.status())) return found;  // another call has created it meanwhile
  v1::JobDefinition definition;
  ToWire(ManifestDigest(manifest), definition.mutable_manifest_digest());
  *definition.mutable_manifest() = manifest;
  definition.set_server_count(static_cast<uint32_t>(jobs_->environment().server_names.size()));
  definition.set_revision(1);
  absl::StatusOr<std::shared_ptr<const JobModel>> model = JobModel::Make(definition);
  if (!model.ok()) return model.status();
  if (absl::Status status = Place(**model, jobs_->environment().server_names, &definition);
      !status.ok())
    return status;
  if (absl::Status status = jobs_->PutEverywhere(definition); !status.ok()) return status;
  return jobs_->Find(manifest.job());
}

// Answers a CreateJob whose job is there.
void JobService::Created(Call* call, const std::shared_ptr<JobRuntime>& job,
                         v1::CreateJobRequest manifest, bool existed,
                         v1::CreateJobResponse* response) const {
  const std::string name = manifest.job();
  const std::shared_ptr<const JobModel> model = job->model();
  if (!SameButPlacement(std::move(manifest), model->definition().manifest())) {
    return call->End(Refuse(absl::StatusCode::kAlreadyExists,
                            absl::StrCat("job '", name, "' exists with another manifest"),
                            v1::ErrorDetail::CONFLICT));
  }
  const auto answer = [=](const absl::StatusOr<step::Answer>&) {  // the report says how far it is
    const step::JobStatusReport report = job->leader()->Status();
    if (existed && !report.serving && !report.has_lost_memory) {
      return call->End(WithPosition(
          absl::UnavailableError(absl::StrCat("job '", name, "' recovers: ", report.waiting_for)),
          report.position, name));
    }
    response->set_existed(existed);
    response->set_durability(v1::DURABILITY_MEMORY);
    response->set_committed_step(report.position.committed_step);
    response->set_epoch(static_cast<uint64_t>(report.position.epoch));
    *response->mutable_manifest_digest() = model->definition().manifest_digest();
    call->End(absl::OkStatus());
  };
  if (!existed) return answer(step::Answer());
  if (const v1::JobStatusResponse status = StatusOf(job.get());
      status.state() == v1::JobStatusResponse::QUARANTINED) {
    return call->End(
        Refuse(absl::StatusCode::kFailedPrecondition,
               absl::StrCat("job '", name, "' cannot be served: ", status.explanation()),
               v1::ErrorDetail::QUARANTINED));
  }
  call->Ask(
      job,
      [](LeaderShell& leader, Caller caller) { return leader.AwaitRecovery(std::move(caller)); },
      answer);
}

void JobService::CreateJob(Call* call, const v1::CreateJobRequest& request,
                           v1::CreateJobResponse* response) {
  if (absl::Status status = jobs_->CheckLeader(); !status.ok()) return call->End(status);
  if (absl::Status status = ValidateName("job", request.job()); !status.ok())
    return call->End(status);
  absl::StatusOr<std::optional<v1::CreateJobRequest>> whole =
      manifests_.Add(request.job(), request);
  if (!whole.ok() || !whole->has_value()) return call->End(whole.status());
  v1::CreateJobRequest manifest = **std::move(whole);
  const bool names_durability = manifest.durability() != v1::DURABILITY_UNSPECIFIED;
  if (absl::Status status = CompleteManifest(&manifest); !status.ok()) return call->End(status);
  const absl::StatusOr<std::shared_ptr<JobRuntime>> found = jobs_->Find(manifest.job());
  if (found.ok()) {
    // A client that names no durability means the one of the job, also when another one has become
    // the default since.
    if (!names_durability)
      manifest.set_durability((*found)->model()->definition().manifest().durability());
    return Created(call, *found, std::move(manifest), /*existed=*/true, response);
  }
  if (!absl::IsNotFound(found.status())) return call->End(found.status());
  Define(call, [=, this, manifest = std::move(manifest)] {
    const bool existed = jobs_->Find(manifest.job()).ok();
    const absl::StatusOr<std::shared_ptr<JobRuntime>> job = FindOrCreate(manifest);
    if (!job.ok()) return call->End(job.status());
    Created(call, *job, manifest, existed, response);
  });
}

absl::Status JobService::GetManifest(const v1::GetManifestRequest& request,
                                     v1::GetManifestResponse* response) {
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->FindOnLeader(request.job());
  if (!job.ok()) return job.status();
  const std::shared_ptr<const JobModel> model = (*job)->model();
  const v1::JobDefinition& definition = model->definition();
  size_t bytes = 0;
  for (uint64_t t = request.first(); t < model->tensors().size(); ++t) {
    const v1::TensorSpec& tensor = definition.manifest().tensors(static_cast<int>(t));
    bytes += tensor.ByteSizeLong() + 4;
    if (response->tensors_size() > 0 &&
        (bytes > kManifestPageBytes ||
         response->tensors_size() >= static_cast<int>(4 * kMaxTensorsPerPage))) {
      response->set_next(t);
      break;
    }
    *response->add_tensors() = tensor;
  }
  response->set_shard_elements(model->shard_elements());
  response->set_seed(definition.manifest().seed());
  response->set_durability(definition.manifest().durability());
  *response->mutable_manifest_digest() = definition.manifest_digest();
  if (request.first() == 0 && definition.has_optimizer())
    *response->mutable_optimizer() = definition.optimizer();
  return absl::OkStatus();
}

absl::Status JobService::GetPlacement(const v1::GetPlacementRequest& request,
                                      v1::GetPlacementResponse* response) {
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->FindOnLeader(request.job());
  if (!job.ok()) return job.status();
  uint64_t next = 0;
  FillPlacement(*jobs_, (*job)->model().get(), request.first(), response->mutable_placement(),
                &next);
  response->mutable_placement()->set_epoch(
      static_cast<uint64_t>((*job)->leader()->Status().position.epoch));
  response->set_next(next);
  return absl::OkStatus();
}

// ---- Optimizer ---------------------------------------------------------------------------------

absl::Status JobService::Configure(JobRuntime* job, const v1::ConfigureOptimizerRequest& request,
                                   const Wait& wait, bool* changed) {
  const std::shared_ptr<const JobModel> model = job->model();
  if (absl::Status status = ValidateOptimizer(*model, request); !status.ok()) return status;
  *changed = !model->definition().has_optimizer() ||
             !SameOptimizer(model->definition().optimizer(), request);
  if (!*changed) return absl::OkStatus();
  v1::JobDefinition definition = model->definition();
  *definition.mutable_optimizer() = request;
  LeaderShell& leader = *job->leader();
  // Ends the open attempt, whose commits have values for the groups of before.
  const auto abort_attempt = [&] {
    const step::Position open = leader.Status().position;
    const step::AbortRequest abort = {
        .generation = open.generation, .step = open.committed_step + 1, .attempt = open.attempt};
    leader.Await(wait, [&](Caller caller) { return leader.Abort(abort, std::move(caller)); })
        .status()
        .IgnoreError();
  };
  const int64_t committed = leader.Status().position.committed_step;
  if (committed > 0) {
    const absl::StatusOr<std::shared_ptr<const JobModel>> asked = JobModel::Make(definition);
    if (!asked.ok()) return asked.status();
    if ((*asked)->Optimizers() != model->Optimizers()) {
      return Refuse(absl::StatusCode::kFailedPrecondition,
                    absl::StrCat("job '", request.job(), "' has stepped to ", committed,
                                 " with another optimizer configuration"),
                    v1::ErrorDetail::CONFLICT);
    }
    abort_attempt();
  }
  for (int tries = 0;; ++tries) {
    // PutEverywhere uses revision + 1 where it puts the old configuration back.
    definition.set_revision(definition.revision() + 2);
    const absl::Status status = jobs_->PutEverywhere(definition);
    if (!absl::IsFailedPrecondition(status) || tries == kConfigureTries) return status;
    // Pieces of a LOAD that somebody left are staged: their attempt ends, everywhere in a moment.
    abort_attempt();
    absl::SleepFor(absl::Milliseconds(50));
  }
}

void JobService::ConfigureOptimizer(Call* call, const v1::ConfigureOptimizerRequest& request,
                                    v1::ConfigureOptimizerResponse* response) {
  const absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->FindOnLeader(request.job());
  if (!job.ok()) return call->End(job.status());
  Define(call, [=, this, &request, job = *job] {
    bool changed = false;
    const Wait wait{call->deadline(), [call] { return call->IsCancelled(); }};
    const absl::Status status = Configure(job.get(), request, wait, &changed);
    response->set_changed(changed);
    call->End(status);
  });
}

// ---- Join --------------------------------------------------------------------------------------

// An operator, who may delete the job, may also commit and abort for any rank.
template <typename Request>
absl::Status JobService::CheckContributor(const Call& call, const Request& request) const {
  if (call.IsOperator(request.job())) return absl::OkStatus();
  return contributors_.Check(request.job(), request.generation(), request.rank(), call.caller());
}

namespace {

absl::Status CheckClient(const v1::JoinRequest& request) {
  if (request.client_id().empty() || request.client_id().size() > kMaxClientIdBytes) {
    return Refuse(absl::StatusCode::kInvalidArgument,
                  absl::StrCat("client_id has ", request.client_id().size(), " bytes; it has 1 to ",
                               kMaxClientIdBytes),
                  v1::ErrorDetail::BAD_REQUEST);
  }
  if (request.world_size() < 1 || request.world_size() > kMaxWorldSize ||
      request.rank() >= request.world_size()) {
    return Refuse(absl::StatusCode::kInvalidArgument,
                  absl::StrCat("rank ", request.rank(), " of world_size ", request.world_size(),
                               "; the limit is ", kMaxWorldSize),
                  v1::ErrorDetail::BAD_REQUEST);
  }
  return absl::OkStatus();
}

// Returns the error as it is sent: with the job's position.
absl::Status Explained(const JobRuntime& job, const absl::Status& status) {
  if (status.ok()) return status;
  return WithPosition(status, job.leader()->Status().position, job.model()->job());
}

// Calls `next` once the job has recovered, which is worth waiting for. A job whose memory is lost
// ends the call, since an operator must decide.
void AfterRecovery(Call* call, const std::shared_ptr<JobRuntime>& job, std::function<void()> next) {
  call->Ask(
      job,
      [](LeaderShell& leader, Caller caller) { return leader.AwaitRecovery(std::move(caller)); },
      [=, next = std::move(next)](const absl::StatusOr<step::Answer>& answer) {
        absl::Status status = answer.status();
        if (status.ok()) status = CheckMemory(job.get());
        if (!status.ok()) return call->End(status);
        next();
      });
}

// Checks a CommitStep and translates it.
absl::StatusOr<step::CommitRequest> CommitOf(const JobRuntime& job,
                                             const v1::CommitStepRequest& request) {
  step::CommitRequest commit;
  commit.rank = static_cast<step::Rank>(request.rank());
  commit.epoch = static_cast<int64_t>(request.epoch());
  commit.generation = static_cast<int64_t>(request.generation());
  commit.step = request.step();
  commit.attempt = static_cast<int64_t>(request.attempt());
  commit.is_load = request.kind() == v1::CommitStepRequest::LOAD;
  commit.scale = request.loss_scale() == 0 ? 1.0 : request.loss_scale();
  if (commit.is_load) return commit;
  const std::shared_ptr<const JobModel> model = job.model();
  if (!model->definition().has_optimizer()) {
    return step::Because(
        step::UnfitStep(job.leader()->Status().position.committed_step),
        absl::FailedPreconditionError(
            absl::StrCat("job '", request.job(), "' has no optimizer: call ConfigureOptimizer")));
  }
  if (absl::Status status = CheckUnscaled(*model, commit.scale); !status.ok()) return status;
  auto groups = ParseGroups(*model, request.groups());
  if (!groups.ok()) return groups.status();
  commit.groups = *std::move(groups);
  commit.absent.assign(request.absent_tensors().begin(), request.absent_tensors().end());
  std::sort(commit.absent.begin(), commit.absent.end());
  commit.absent.erase(std::unique(commit.absent.begin(), commit.absent.end()), commit.absent.end());
  return commit;
}

void Committed(const step::Answer& answer, v1::CommitStepResponse* response) {
  if (answer.decision != nullptr) FillCommitted(*answer.decision, response);
  response->set_epoch(static_cast<uint64_t>(answer.position.epoch));
  response->set_reached(v1::DURABILITY_MEMORY);
  response->set_next_attempt(static_cast<uint32_t>(std::max<int64_t>(answer.position.attempt, 1)));
}

}  // namespace

void JobService::Join(Call* call, const v1::JoinRequest& request, v1::JoinResponse* response) {
  const absl::StatusOr<std::shared_ptr<JobRuntime>> found = jobs_->FindOnLeader(request.job());
  if (!found.ok()) return call->End(found.status());
  const std::shared_ptr<JobRuntime>& job = *found;
  if (absl::Status status = CheckClient(request); !status.ok()) return call->End(status);
  step::JoinRequest join;
  join.rank = static_cast<step::Rank>(request.rank());
  join.world_size = static_cast<int>(request.world_size());
  join.generation = static_cast<int64_t>(request.generation());
  join.client = request.client_id();
  if (request.has_min_committed_step()) join.min_committed_step = request.min_committed_step();
  // A page of a layout claims the rank too: pages of two clients do not mix.
  absl::Status claimed = CheckContributor(*call, request);
  if (claimed.ok()) claimed = job->leader()->ClaimRank(join);
  if (!claimed.ok()) return call->End(Explained(*job, claimed));
  if (join.generation > 0) {
    auto layout =
        layouts_.Add({request.job(), request.generation(), request.rank()}, request.layout());
    if (!layout.ok() || !layout->has_value()) return call->End(layout.status());
    auto contributions =
        Contributions(*job->model(), **layout, request.rank(), request.world_size());
    if (!contributions.ok()) return call->End(contributions.status());
    join.contributions = *std::move(contributions);
    // The call keeps them while it waits, and the leader a copy.
    if (absl::Status room = call->Hold(2 * step::HeldBytes(join.contributions)); !room.ok())
      return call->End(room);
  }
  AfterRecovery(call, job, [=, this, &request] {
    call->Ask(
        job,
        [&](LeaderShell& leader, Caller caller) { return leader.Join(join, std::move(caller)); },
        [=, this, &request](const absl::StatusOr<step::Answer>& answer) {
          if (answer.ok()) {
            if (request.generation() > 0)
              contributors_.Joined(request.job(), request.generation(), request.rank(),
                                   call->caller());
            Joined(*job, request, *answer, response);
          }
          call->End(Explained(*job, answer.status()));
        });
  });
}

void JobService::Joined(const JobRuntime& job, const v1::JoinRequest& request,
                        const step::Answer& answer, v1::JoinResponse* response) const {
  response->set_generation(request.generation() > 0
                               ? request.generation()
                               : static_cast<uint64_t>(answer.generation_issued));
  response->set_epoch(static_cast<uint64_t>(answer.position.epoch));
  response->set_committed_step(answer.position.committed_step);
  response->set_attempt(static_cast<uint32_t>(answer.position.attempt));
  const std::shared_ptr<const JobModel> model = job.model();
  uint64_t next = 0;
  FillPlacement(*jobs_, model.get(), 0, response->mutable_placement(), &next);
  response->mutable_placement()->set_epoch(response->epoch());
  response->set_next_placement_run(next);
  response->set_optimizer_configured(model->definition().has_optimizer());
}

// ---- Steps -------------------------------------------------------------------------------------

void JobService::CommitStep(Call* call, const v1::CommitStepRequest& request,
                            v1::CommitStepResponse* response) {
  const absl::StatusOr<std::shared_ptr<JobRuntime>> found = jobs_->FindOnLeader(request.job());
  if (!found.ok()) return call->End(found.status());
  const std::shared_ptr<JobRuntime>& job = *found;
  absl::Status fit = CheckContributor(*call, request);
  if (fit.ok()) fit = CheckLossScale(request.loss_scale());
  if (!fit.ok()) return call->End(Explained(*job, fit));
  AfterRecovery(call, job, [=, &request] {
    const absl::StatusOr<step::CommitRequest> commit = CommitOf(*job, request);
    if (!commit.ok()) return call->End(Explained(*job, commit.status()));
    call->Ask(
        job,
        [&](LeaderShell& leader, Caller caller) {
          return leader.Commit(*commit, std::move(caller));
        },
        [=](const absl::StatusOr<step::Answer>& answer) {
          if (answer.ok()) Committed(*answer, response);
          call->End(Explained(*job, answer.status()));
        });
  });
}

void JobService::AbortStep(Call* call, const v1::AbortStepRequest& request,
                           v1::AbortStepResponse* response) {
  const absl::StatusOr<std::shared_ptr<JobRuntime>> found = jobs_->FindOnLeader(request.job());
  if (!found.ok()) return call->End(found.status());
  const std::shared_ptr<JobRuntime>& job = *found;
  if (request.reason().size() > kMaxReasonBytes) {
    return call->End(Refuse(absl::StatusCode::kInvalidArgument,
                            absl::StrCat("reason has ", request.reason().size(),
                                         " bytes; the limit is ", kMaxReasonBytes),
                            v1::ErrorDetail::BAD_REQUEST));
  }
  if (absl::Status owner = CheckContributor(*call, request); !owner.ok()) return call->End(owner);
  step::AbortRequest abort;
  abort.generation = static_cast<int64_t>(request.generation());
  abort.step = request.step();
  abort.attempt = static_cast<int64_t>(request.attempt());
  call->Ask(
      job,
      [&](LeaderShell& leader, Caller caller) { return leader.Abort(abort, std::move(caller)); },
      [=, this, &request](const absl::StatusOr<step::Answer>& answer) {
        if (answer.ok()) {
          MutexLock lock(&mutex_);
          abort_reasons_[request.job()] = request.reason();
          response->set_attempt(static_cast<uint32_t>(answer->position.attempt));
        }
        call->End(Explained(*job, answer.status()));
      });
}

void JobService::Hold(Call* call, const v1::HoldRequest& request, v1::HoldResponse* response) {
  const absl::StatusOr<std::shared_ptr<JobRuntime>> found = jobs_->FindOnLeader(request.job());
  if (!found.ok()) return call->End(found.status());
  const std::shared_ptr<JobRuntime>& job = *found;
  if (request.duration_ms() > kMaxHoldMs || request.holder().empty() ||
      request.holder().size() > kMaxClientIdBytes) {
    return call->End(Refuse(
        absl::StatusCode::kInvalidArgument,
        absl::StrCat("duration_ms ", request.duration_ms(), " (limit ", kMaxHoldMs, "), holder of ",
                     request.holder().size(), " bytes (1 to ", kMaxClientIdBytes, ")"),
        v1::ErrorDetail::BAD_REQUEST));
  }
  call->Ask(
      job,
      [&](LeaderShell& leader, Caller caller) {
        return leader.Hold(request.holder(), request.step(), request.duration_ms(),
                           std::move(caller));
      },
      [=, &request](const absl::StatusOr<step::Answer>& answer) {
        response->set_step(request.step());
        call->End(Explained(*job, answer.status()));
      });
}

absl::Status JobService::JobStatus(const v1::JobStatusRequest& request,
                                   v1::JobStatusResponse* response) {
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->FindOnLeader(request.job());
  if (DetailOf(job.status()).reason() == v1::ErrorDetail::QUARANTINED) {
    *response = StatusOf(request.job(), job.status());
    return absl::OkStatus();
  }
  if (!job.ok()) return job.status();
  *response = StatusOf(job->get());
  for (step::Rank rank : (*job)->leader()->Status().joined_ranks)
    response->add_joined_ranks(static_cast<uint32_t>(rank));
  MutexLock lock(&mutex_);
  const auto it = abort_reasons_.find(request.job());
  if (it != abort_reasons_.end()) response->set_abort_reason(it->second);
  return absl::OkStatus();
}

void JobService::DeleteJob(Call* call, const v1::DeleteJobRequest& request,
                           v1::DeleteJobResponse* response) {
  if (absl::Status status = jobs_->CheckLeader(); !status.ok()) return call->End(status);
  if (request.confirm() != request.job()) {
    return call->End(Refuse(absl::StatusCode::kInvalidArgument,
                            "`confirm` must repeat the job's name", v1::ErrorDetail::BAD_REQUEST));
  }
  Define(call, [=, this, &request] {
    bool existed = false;
    const absl::Status status = Delete(request.job(), &existed);
    response->set_existed(existed);
    call->End(status);
  });
}

// Deletes a job on all servers, on this one last. Waits for them.
absl::Status JobService::Delete(const std::string& name, bool* existed) {
  const JobTable::Deletion deletion(jobs_, name);
  const Environment& environment = jobs_->environment();
  for (int to = 0; to < static_cast<int>(environment.server_names.size()); ++to) {
    if (to == environment.self) continue;
    if (absl::Status status = environment.peers->DropJob(to, name); !status.ok()) return status;
  }
  const absl::Status status = jobs_->Drop(name, existed);
  MutexLock lock(&mutex_);
  abort_reasons_.erase(name);
  contributors_.Forget(name);
  return status;
}

void JobService::AddTo(Rpcs* rpcs) {
  rpcs->Add("/orlop.v1.Job/CreateJob", this, &JobService::CreateJob);
  rpcs->Add("/orlop.v1.Job/GetManifest", this, &JobService::GetManifest);
  rpcs->Add("/orlop.v1.Job/GetPlacement", this, &JobService::GetPlacement);
  rpcs->Add("/orlop.v1.Job/ConfigureOptimizer", this, &JobService::ConfigureOptimizer);
  rpcs->Add("/orlop.v1.Job/Join", this, &JobService::Join);
  rpcs->Add("/orlop.v1.Job/CommitStep", this, &JobService::CommitStep);
  rpcs->Add("/orlop.v1.Job/AbortStep", this, &JobService::AbortStep);
  rpcs->Add("/orlop.v1.Job/Hold", this, &JobService::Hold);
  rpcs->Add("/orlop.v1.Job/JobStatus", this, &JobService::JobStatus);
  rpcs->Add("/orlop.v1.Job/DeleteJob", this, &JobService::DeleteJob);
}

void JobService::Tick() {
  manifests_.ForgetOld();
  layouts_.ForgetOld();
}

}  // namespace orlop::server
