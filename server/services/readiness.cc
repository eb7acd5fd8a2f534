#include "server/services/readiness.h"

#include <algorithm>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "server/services/job_status.h"

namespace orlop::server {
namespace {

constexpr auto kAnswerTimeout = std::chrono::seconds(1);

bool IsAnswered(const v1::JobStatusResponse& status) {
  return status.state() != v1::JobStatusResponse::RECOVERING &&
         status.state() != v1::JobStatusResponse::WAITING;
}

}  // namespace

std::string AwaitedBy(const JobTable& jobs) {
  const std::vector<std::shared_ptr<JobRuntime>> here = jobs.List();
  if (here.empty()) return "";
  const Environment& environment = jobs.environment();
  v1::ListJobsResponse known;
  if (environment.is_leader()) {
    for (const std::shared_ptr<JobRuntime>& job : here) *known.add_jobs() = StatusOf(job.get());
  } else {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + kAnswerTimeout);
    if (!environment.peers->admin(0)->ListJobs(&context, v1::ListJobsRequest(), &known).ok()) {
      return absl::StrCat("the step leader, server ", environment.server_names[0],
                          ", does not answer");
    }
  }
  for (const std::shared_ptr<JobRuntime>& job : here) {
    const std::string name = job->model()->job();
    const auto status = std::find_if(known.jobs().begin(), known.jobs().end(),
                                     [&](const auto& each) { return each.job() == name; });
    if (status == known.jobs().end()) continue;  // deleted while this server was away
    // A state of an earlier epoch is about what an earlier process of this server held.
    const bool is_mine =
        job->HasReported() && static_cast<int64_t>(status->epoch()) == job->position().epoch;
    if (is_mine && IsAnswered(*status)) continue;
    return absl::StrCat("job '", name, "' recovers", status->explanation().empty() ? "" : ": ",
                        status->explanation());
  }
  return "";
}

}  // namespace orlop::server
