#include "server/services/readiness.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "orlop/v1/admin.pb.h"
#include "orlop/v1/job.pb.h"
#include "server/runtime/environment.h"
#include "server/runtime/job_table.h"
#include "server/services/job_status.h"
#include "spdlog/spdlog.h"

namespace orlop::server {
namespace {

constexpr auto kAnswerTimeout = std::chrono::seconds(1);
constexpr auto kPoll = std::chrono::milliseconds(50);
constexpr auto kReport = std::chrono::seconds(10);

bool IsAnswered(const v1::JobStatusResponse& status) {
  return status.state() != v1::JobStatusResponse::RECOVERING &&
         status.state() != v1::JobStatusResponse::WAITING;
}

}  // namespace

std::string WhatIsAwaited(const JobTable& jobs) {
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
        job->IsForeign() ||
        (job->HasReported() && static_cast<int64_t>(status->epoch()) == job->position().epoch);
    if (is_mine && IsAnswered(*status)) continue;
    return absl::StrCat("job '", name, "' recovers", status->explanation().empty() ? "" : ": ",
                        status->explanation());
  }
  return "";
}

void Readiness::Start() {
  MutexLock lock(&join_mutex_);
  thread_ = std::thread([this] { Run(); });
}

std::string Readiness::awaited() const {
  MutexLock lock(&mutex_);
  return awaited_;
}

void Readiness::Run() {
  auto next_report = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  for (std::string awaited; !(awaited = WhatIsAwaited(*jobs_)).empty();) {
    const auto now = std::chrono::steady_clock::now();
    if (now >= next_report) {
      spdlog::warn("not ready yet: {}", awaited);
      next_report = now + kReport;
    }
    MutexLock lock(&mutex_);
    awaited_ = awaited;
    while (!ends_ && ended_.WaitUntil(&mutex_, now + kPoll)) {
    }
    if (ends_) return;
  }
  is_ready_ = true;
  on_ready_();
}

void Readiness::End() {
  {
    MutexLock lock(&mutex_);
    ends_ = true;
    ended_.SignalAll();
  }
  MutexLock lock(&join_mutex_);
  if (thread_.joinable()) thread_.join();
}

}  // namespace orlop::server
