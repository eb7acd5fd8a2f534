// The service v1::Job. The step leader serves it; other servers answer FailedPrecondition
// (NOT_LEADER). A handler checks the request, calls the job's runtime, and fills the response.
//   Threads  a call that waits for workers or for the job holds none.
//   Status   as job.proto says.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "base/mutex.h"
#include "base/thread_pool.h"
#include "orlop/v1/job.pb.h"
#include "server/runtime/job_table.h"
#include "server/services/contributors.h"
#include "server/services/gate.h"
#include "server/services/paged_lists.h"

namespace orlop::server {

class JobService final {
 public:
  // `jobs` must outlive the service.
  explicit JobService(JobTable* jobs)
      : jobs_(jobs), manifests_(jobs->environment().tiers), layouts_(jobs->environment().tiers) {}

  // Adds the RPCs of the service, which must outlive `rpcs`.
  void AddTo(Rpcs* rpcs);

  // Forgets lists of which no page has come for kMaxManifestPageAgeSeconds. The server's ticker
  // calls it.
  void Tick();

 private:
  void CreateJob(Call* call, const v1::CreateJobRequest& request, v1::CreateJobResponse* response);
  absl::Status GetManifest(const v1::GetManifestRequest& request,
                           v1::GetManifestResponse* response);
  absl::Status GetPlacement(const v1::GetPlacementRequest& request,
                            v1::GetPlacementResponse* response);
  void ConfigureOptimizer(Call* call, const v1::ConfigureOptimizerRequest& request,
                          v1::ConfigureOptimizerResponse* response);
  void Join(Call* call, const v1::JoinRequest& request, v1::JoinResponse* response);
  void CommitStep(Call* call, const v1::CommitStepRequest& request,
                  v1::CommitStepResponse* response);
  void AbortStep(Call* call, const v1::AbortStepRequest& request, v1::AbortStepResponse* response);
  void Hold(Call* call, const v1::HoldRequest& request, v1::HoldResponse* response);
  absl::Status JobStatus(const v1::JobStatusRequest& request, v1::JobStatusResponse* response);
  void DeleteJob(Call* call, const v1::DeleteJobRequest& request, v1::DeleteJobResponse* response);
  absl::Status Delete(const std::string& name, bool* existed);

  void Define(Call* call, std::function<void()> task);
  absl::StatusOr<std::shared_ptr<JobRuntime>> FindOrCreate(const v1::CreateJobRequest& manifest);
  void Created(Call* call, const std::shared_ptr<JobRuntime>& job, v1::CreateJobRequest manifest,
               bool existed, v1::CreateJobResponse* response) const;
  absl::Status Configure(JobRuntime* job, const v1::ConfigureOptimizerRequest& request,
                         const Wait& wait, bool* changed);
  // Checks that the caller of a Join, a CommitStep or an AbortStep has joined as its rank.
  template <typename Request>
  absl::Status CheckContributor(const Call& call, const Request& request) const;
  void Joined(const JobRuntime& job, const v1::JoinRequest& request, const step::Answer& answer,
              v1::JoinResponse* response) const;

  JobTable* const jobs_;
  Contributors contributors_;
  Mutex mutex_;
  PagedLists<std::string, v1::CreateJobRequest> manifests_;  // by job
  // By job, generation and rank.
  PagedLists<std::tuple<std::string, uint64_t, uint32_t>, v1::ContributionLayout> layouts_;
  std::map<std::string, std::string> abort_reasons_ GUARDED_BY(mutex_);  // the last ones, by job
  // Its one thread creates, configures and deletes jobs on all servers, one after the other. It
  // waits for those servers, so that no thread of other calls does.
  ThreadPool definitions_{1};
};

}  // namespace orlop::server
