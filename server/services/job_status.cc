#include "server/services/job_status.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/cluster/peer_links.h"
#include "server/job/job_model.h"
#include "server/runtime/environment.h"
#include "server/runtime/job_table.h"
#include "server/runtime/step_scalars.h"
#include "server/step/layout.h"
#include "server/step/leader.h"

namespace orlop::server {

void FillPlacement(const JobTable& jobs, const JobModel* model, uint64_t first,
                   v1::PlacementMap* map, uint64_t* next) {
  const Environment& environment = jobs.environment();
  for (int i = 0; i < static_cast<int>(environment.server_names.size()); ++i) {
    const PeerAddress& peer = environment.peers->address(i);
    v1::ServerInfo* info = map->add_servers();
    info->set_name(peer.name);
    info->set_address(peer.address);
    info->set_leader(i == 0);
    info->set_ready(true);
    if (i == environment.self) *info = environment.identity();
  }
  *next = 0;
  if (model == nullptr) return;
  const v1::JobDefinition& definition = model->definition();
  for (uint64_t r = first; r < static_cast<uint64_t>(definition.runs_size()); ++r) {
    if (map->runs_size() == static_cast<int>(kMaxPlacementRunsPerPage)) {
      *next = r;
      return;
    }
    *map->add_runs() = definition.runs(static_cast<int>(r));
  }
}

namespace {

// Says which servers refuse the messages of a job that does not serve, and why.
void AddRefusals(const JobRuntime& job, v1::JobStatusResponse* out) {
  for (const auto& [server, why] : job.refusals()) {
    if (DetailOf(why).reason() == v1::ErrorDetail::QUARANTINED)
      out->set_state(v1::JobStatusResponse::QUARANTINED);
    absl::StrAppend(out->mutable_explanation(), "; ", why.message());
  }
}

// Names the other steps that the job can go back to, and why the newest one may be missing.
void ExplainOffers(const step::JobStatusReport& report, const JobRuntime& job,
                   v1::JobStatusResponse* out) {
  std::vector<std::string> reasons;
  if (!report.waiting_for.empty()) reasons.push_back(report.waiting_for);
  if (report.rollback_offers.size() > 1) {
    std::vector<int64_t> steps;
    steps.reserve(report.rollback_offers.size());
    for (const auto& offer : report.rollback_offers) steps.push_back(offer.step);
    reasons.push_back(
        absl::StrCat("steps that all servers can go back to: ", absl::StrJoin(steps, ", ")));
  }
  if (job.has_lost_writes())
    reasons.push_back("the store of the step leader has lost writes, newer flushes may be missing");
  out->set_explanation(absl::StrJoin(reasons, "; "));
}

}  // namespace

v1::JobStatusResponse StatusOf(JobRuntime* job) {
  v1::JobStatusResponse out;
  const std::shared_ptr<const JobModel> model = job->model();
  const step::JobStatusReport report = job->leader()->Status();
  out.set_job(model->job());
  out.set_committed_step(report.position.committed_step);
  out.set_applied_step(report.applied_step);
  out.set_epoch(static_cast<uint64_t>(report.position.epoch));
  out.set_generation(static_cast<uint64_t>(report.position.generation));
  out.set_attempt(static_cast<uint32_t>(report.position.attempt));
  out.set_required(model->definition().manifest().durability());
  out.set_tensor_count(model->tensors().size());
  out.set_parameter_count(model->parameter_count());
  out.set_explanation(report.waiting_for);
  if (const auto layout = job->layout())
    out.set_world_size(static_cast<uint32_t>(layout->world_size()));
  for (step::Rank rank : report.committed_ranks)
    out.add_committed_ranks(static_cast<uint32_t>(rank));
  if (report.last_decision != nullptr) {
    FillCommitted(*report.last_decision, out.mutable_last_decision());
    out.mutable_last_decision()->set_reached(v1::DURABILITY_MEMORY);
  }
  if (report.has_lost_memory && !report.rollback_offers.empty())
    out.set_rollback_step(report.rollback_offers.front().step);
  if (report.serving) {
    out.set_state(report.position.committed_step < 0 ? v1::JobStatusResponse::LOADING
                                                     : v1::JobStatusResponse::READY);
  } else if (out.has_rollback_step()) {
    out.set_state(v1::JobStatusResponse::ROLLBACK_OFFERED);
    ExplainOffers(report, *job, &out);
  } else if (report.has_lost_memory) {
    out.set_state(v1::JobStatusResponse::LOST);
  } else {
    out.set_state(report.waiting_for.empty() ? v1::JobStatusResponse::RECOVERING
                                             : v1::JobStatusResponse::WAITING);
    AddRefusals(*job, &out);
  }
  return out;
}

v1::JobStatusResponse StatusOf(const std::string& job, const absl::Status& quarantine) {
  v1::JobStatusResponse out;
  out.set_job(job);
  out.set_state(v1::JobStatusResponse::QUARANTINED);
  out.set_explanation(std::string(quarantine.message()));
  return out;
}

absl::Status CheckMemory(JobRuntime* job) {
  if (!job->leader()->HasLostMemory()) return absl::OkStatus();
  const v1::JobStatusResponse status = StatusOf(job);
  v1::ErrorDetail detail;
  detail.set_job(status.job());
  detail.set_reason(status.has_rollback_step() ? v1::ErrorDetail::ROLLBACK_OFFERED
                                               : v1::ErrorDetail::LOST);
  if (status.has_rollback_step()) detail.set_version(status.rollback_step());
  return MakeError(
      absl::StatusCode::kDataLoss,
      status.has_rollback_step()
          ? absl::StrCat("job '", status.job(), "' lost its memory; a rollback to step ",
                         status.rollback_step(), " can be accepted")
          : absl::StrCat("job '", status.job(),
                         "' lost its memory and no flush is common to all shards"),
      detail);
}

}  // namespace orlop::server
