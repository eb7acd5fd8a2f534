// The service v1::Job. The step leader serves it; other servers answer FailedPrecondition
// (NOT_LEADER). A handler checks the request, calls the job's runtime, and fills the response.
//   Threads  one for each call in progress, but none for a Join, CommitStep or AbortStep that
//            waits.
//   Status   as job.proto says.
#pragma once

#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "orlop/v1/job.grpc.pb.h"
#include "server/runtime/job_table.h"
#include "server/services/paged_lists.h"
#include "server/services/waiting_call.h"

namespace orlop::server {

// What may wait for other workers or servers holds no thread (WaitingCall).
using JobServiceBase = v1::Job::WithCallbackMethod_Join<v1::Job::WithCallbackMethod_CommitStep<
    v1::Job::WithCallbackMethod_AbortStep<v1::Job::Service>>>;

class JobService final : public JobServiceBase {
 public:
  // `jobs` must outlive the service.
  explicit JobService(JobTable* jobs)
      : jobs_(jobs), manifests_(jobs->environment().tiers), layouts_(jobs->environment().tiers) {}

  grpc::Status CreateJob(grpc::ServerContext*, const v1::CreateJobRequest*,
                         v1::CreateJobResponse*) override;
  grpc::Status GetManifest(grpc::ServerContext*, const v1::GetManifestRequest*,
                           v1::GetManifestResponse*) override;
  grpc::Status GetPlacement(grpc::ServerContext*, const v1::GetPlacementRequest*,
                            v1::GetPlacementResponse*) override;
  grpc::Status ConfigureOptimizer(grpc::ServerContext*, const v1::ConfigureOptimizerRequest*,
                                  v1::ConfigureOptimizerResponse*) override;
  grpc::ServerUnaryReactor* Join(grpc::CallbackServerContext*, const v1::JoinRequest*,
                                 v1::JoinResponse*) override;
  grpc::ServerUnaryReactor* CommitStep(grpc::CallbackServerContext*, const v1::CommitStepRequest*,
                                       v1::CommitStepResponse*) override;
  grpc::ServerUnaryReactor* AbortStep(grpc::CallbackServerContext*, const v1::AbortStepRequest*,
                                      v1::AbortStepResponse*) override;
  grpc::Status Hold(grpc::ServerContext*, const v1::HoldRequest*, v1::HoldResponse*) override;
  grpc::Status JobStatus(grpc::ServerContext*, const v1::JobStatusRequest*,
                         v1::JobStatusResponse*) override;
  grpc::Status DeleteJob(grpc::ServerContext*, const v1::DeleteJobRequest*,
                         v1::DeleteJobResponse*) override;

  // Forgets lists of which no page has come for kMaxManifestPageAgeSeconds. The server's ticker
  // calls it.
  void Tick();

 private:
  absl::Status Create(v1::CreateJobRequest manifest, const Wait& wait,
                      v1::CreateJobResponse* response);
  absl::Status Configure(JobRuntime* job, const v1::ConfigureOptimizerRequest& request,
                         const Wait& wait, bool* changed);
  absl::StatusOr<std::shared_ptr<JobRuntime>> FindFor(const WaitingCall& call,
                                                      const std::string& job) const;
  void Joined(const JobRuntime& job, const v1::JoinRequest& request, const step::Answer& answer,
              v1::JoinResponse* response) const;

  JobTable* const jobs_;
  Mutex mutex_;
  Mutex definition_mutex_;  // one CreateJob, ConfigureOptimizer or DeleteJob at a time; taken first
  PagedLists<std::string, v1::CreateJobRequest> manifests_;  // by job
  // By job, generation and rank.
  PagedLists<std::tuple<std::string, uint64_t, uint32_t>, v1::ContributionLayout> layouts_;
  std::map<std::string, std::string> abort_reasons_ GUARDED_BY(mutex_);  // the last ones, by job
};

}  // namespace orlop::server
