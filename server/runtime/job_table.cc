#include "server/runtime/job_table.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/convert.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/durability/flush.h"
#include "server/job/definition.h"
#include "server/job/job_model.h"
#include "server/runtime/environment.h"
#include "server/runtime/job_opening.h"
#include "server/runtime/job_runtime.h"
#include "spdlog/spdlog.h"
#include "storage/store.h"

namespace orlop::server {
namespace {

constexpr char kPrefix[] = "job/";

// Whether an error is about one job alone. If it is about the disk or the memory, that the other
// jobs need too, nothing must be opened.
bool IsOfItself(const absl::Status& status) {
  return absl::IsDataLoss(status) || absl::IsInvalidArgument(status) ||
         absl::IsFailedPrecondition(status) || absl::IsUnimplemented(status);
}

absl::Status CheckServers(const v1::JobDefinition& definition, const Environment& environment) {
  if (definition.server_count() == environment.server_names.size()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "job '", definition.manifest().job(), "' was placed on ", definition.server_count(),
      " servers, --peers lists ", environment.server_names.size()));
}

}  // namespace

absl::Status JobTable::OpenAll() {
  auto stored = environment_.data->store().Scan(kPrefix);
  if (!stored.ok()) return stored.status();
  for (const auto& [key, value] : *stored) {
    if (environment_.must_end()) return absl::CancelledError("the server is to end");
    const std::string job = key.substr(sizeof(kPrefix) - 1);
    const absl::Status status = OpenStored(job, value);
    if (status.ok()) continue;
    if (!IsOfItself(status)) return Annotated(status, absl::StrCat("job '", job, "'"));
    spdlog::error("job {}: cannot be opened and is quarantined; its bytes stay on disk: {}", job,
                  std::string(status.message()));
    if (absl::Status kept = KeepCleanMark(environment_, job); !kept.ok()) return kept;
    MutexLock lock(&mutex_);
    quarantined_[job] = status;
  }
  // Jobs are started only after all could be opened: a server that cannot start leaves every job on
  // disk as it was.
  if (absl::Status marked = environment_.data->MarkStarted(); !marked.ok()) return marked;
  for (const std::shared_ptr<JobRuntime>& job : List())
    if (absl::Status status = job->Start(); !status.ok()) return status;
  MutexLock lock(&mutex_);
  serving_ = true;
  return absl::OkStatus();
}

absl::Status JobTable::OpenStored(const std::string& job, const std::string& bytes) {
  v1::JobDefinition definition;
  if (!definition.ParseFromString(bytes) || definition.manifest().job() != job)
    return absl::DataLossError("its stored definition is damaged");
  if (absl::Status status = CheckDefinition(definition); !status.ok()) return status;
  return Insert(definition, /*is_new=*/false);
}

// Checks a definition that another server has sent, or that the disk gave back.
absl::Status JobTable::CheckDefinition(const v1::JobDefinition& definition) const {
  if (absl::Status status = CheckServers(definition, environment_); !status.ok()) return status;
  return server::CheckDefinition(definition).status();
}

absl::Status JobTable::Insert(const v1::JobDefinition& definition, bool is_new) {
  absl::StatusOr<std::shared_ptr<JobRuntime>> job =
      JobRuntime::Open(environment_, definition, is_new);
  if (!job.ok()) return job.status();
  if (is_new) {
    const std::string key = kPrefix + definition.manifest().job();
    absl::Status status =
        environment_.data->store().Commit({{{key, definition.SerializeAsString()}}, {}, {}});
    if (!status.ok()) return status;
  }
  {
    MutexLock lock(&mutex_);
    jobs_[definition.manifest().job()] = *job;
  }
  return is_new ? (*job)->Start() : absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<JobRuntime>> JobTable::Find(const std::string& job) const {
  MutexLock lock(&mutex_);
  v1::ErrorDetail detail;
  detail.set_job(Beginning(job, kMaxNameBytes));
  detail.set_server(environment_.server_names[environment_.self]);
  if (!serving_) {
    detail.set_reason(v1::ErrorDetail::STOPPING);
    return MakeError(absl::StatusCode::kUnavailable,
                     absl::StrCat("server ", detail.server(), " is starting or stopping"), detail);
  }
  const auto it = jobs_.find(job);
  if (it != jobs_.end()) return it->second;
  if (const auto bad = quarantined_.find(job); bad != quarantined_.end()) {
    detail.set_reason(v1::ErrorDetail::QUARANTINED);
    return MakeError(
        absl::StatusCode::kFailedPrecondition,
        absl::StrCat("server ", detail.server(), " cannot open job '", detail.job(),
                     "': ", bad->second.message(), "; its bytes stay on disk until it is deleted"),
        detail);
  }
  detail.set_reason(v1::ErrorDetail::UNKNOWN_JOB);
  return MakeError(absl::StatusCode::kNotFound, absl::StrCat("no job '", detail.job(), "'"),
                   detail);
}

absl::Status JobTable::CheckLeader() const {
  if (environment_.is_leader()) {
    MutexLock lock(&mutex_);
    if (serving_) return absl::OkStatus();
    return MakeError(absl::StatusCode::kUnavailable, "the server is starting or stopping",
                     v1::ErrorDetail::STOPPING);
  }
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::NOT_LEADER);
  detail.set_server(environment_.server_names[0]);
  return MakeError(absl::StatusCode::kFailedPrecondition,
                   absl::StrCat("this call goes to the step leader, server ", detail.server()),
                   detail);
}

absl::StatusOr<std::shared_ptr<JobRuntime>> JobTable::FindOnLeader(const std::string& job) const {
  if (absl::Status status = CheckLeader(); !status.ok()) return status;
  return Find(job);
}

std::vector<std::shared_ptr<JobRuntime>> JobTable::List() const {
  MutexLock lock(&mutex_);
  std::vector<std::shared_ptr<JobRuntime>> jobs;
  jobs.reserve(jobs_.size());
  for (const auto& [name, job] : jobs_) jobs.push_back(job);
  return jobs;
}

std::map<std::string, absl::Status> JobTable::Quarantined() const {
  MutexLock lock(&mutex_);
  return quarantined_;
}

namespace {

bool SamePlacement(const v1::JobDefinition& a, const v1::JobDefinition& b) {
  return std::equal(a.runs().begin(), a.runs().end(), b.runs().begin(), b.runs().end(),
                    [](const auto& one, const auto& other) {
                      return one.SerializeAsString() == other.SerializeAsString();
                    });
}

}  // namespace

absl::Status JobTable::Put(const v1::JobDefinition& definition) {
  if (absl::Status status = CheckDefinition(definition); !status.ok())
    return MakeError(absl::StatusCode::kInvalidArgument, std::string(status.message()),
                     v1::ErrorDetail::BAD_REQUEST);
  MutexLock change(&change_mutex_);
  const std::string& name = definition.manifest().job();
  absl::StatusOr<std::shared_ptr<JobRuntime>> found = Find(name);
  if (found.status().code() == absl::StatusCode::kNotFound) {
    if (List().size() >= kMaxJobs) {
      return MakeError(absl::StatusCode::kResourceExhausted,
                       absl::StrCat("the limit is ", kMaxJobs, " jobs"), v1::ErrorDetail::BUDGET);
    }
    return Insert(definition, /*is_new=*/true);
  }
  if (!found.ok()) return found.status();
  const std::shared_ptr<const JobModel> model = (*found)->model();
  if (FromWire(model->definition().manifest_digest()) != FromWire(definition.manifest_digest())) {
    return MakeError(absl::StatusCode::kAlreadyExists,
                     absl::StrCat("job '", name, "' exists with another manifest"),
                     v1::ErrorDetail::CONFLICT);
  }
  if (!SamePlacement(definition, model->definition())) {
    return MakeError(absl::StatusCode::kAlreadyExists,
                     absl::StrCat("job '", name, "' exists on server ",
                                  environment_.server_names[environment_.self],
                                  " with its shards on other servers: delete it"),
                     v1::ErrorDetail::CONFLICT);
  }
  if (definition.revision() <= model->definition().revision()) return absl::OkStatus();
  if (absl::Status status = (*found)->Configure(definition); !status.ok()) return status;
  return environment_.data->store().Commit(
      {{{kPrefix + name, definition.SerializeAsString()}}, {}, {}});
}

absl::Status JobTable::PutEverywhere(const v1::JobDefinition& definition) {
  const std::string& name = definition.manifest().job();
  const absl::StatusOr<std::shared_ptr<JobRuntime>> before = Find(name);
  std::vector<int> done;
  absl::Status status;
  for (int to = static_cast<int>(environment_.server_names.size()) - 1; to >= 0 && status.ok();
       --to) {
    status = to == environment_.self ? Put(definition) : environment_.peers->PutJob(to, definition);
    if (status.ok()) done.push_back(to);
  }
  if (status.ok()) return status;
  for (int to : done) {  // puts back what was there before
    if (to == environment_.self) continue;
    if (before.ok()) {
      v1::JobDefinition old = (*before)->model()->definition();
      old.set_revision(definition.revision() + 1);
      environment_.peers->PutJob(to, old)
          .IgnoreError();  // the server keeps the new definition until the caller's next try
    } else {
      environment_.peers->DropJob(to, name).IgnoreError();
    }
  }
  return status;
}

absl::Status JobTable::Drop(const std::string& name, bool* existed) {
  MutexLock change(&change_mutex_);
  std::shared_ptr<JobRuntime> job;
  {
    MutexLock lock(&mutex_);
    const auto it = jobs_.find(name);
    *existed = it != jobs_.end() || quarantined_.contains(name);
    if (!*existed) return absl::OkStatus();
    if (it != jobs_.end()) {
      job = it->second;
      jobs_.erase(it);
    }
    quarantined_.erase(name);
  }
  if (job != nullptr) job->Close();
  environment_.tiers->accountant().Forget(name);
  // First, because a later job of this name must never take these flushes for its own state.
  if (absl::Status status = environment_.data->EraseValue(CleanKey(name)); !status.ok())
    return status;
  storage::Batch batch;
  batch.erase = {kPrefix + name};
  if (absl::Status status = environment_.data->store().Commit(batch); !status.ok()) return status;
  environment_.data->EraseValue(RecordKey(name)).IgnoreError();  // the job is already deleted
  environment_.data->EraseValue(IncarnationKey(name)).IgnoreError();
  return EraseFlushes(&environment_.data->store(), name);
}

JobTable::Deletion::Deletion(JobTable* table, std::string job)
    : table_(table), job_(std::move(job)) {
  MutexLock lock(&table_->mutex_);
  table_->deleting_.insert(job_);
  while (table_->puts_again_.contains(job_)) table_->put_again_.Wait(&table_->mutex_);
}

JobTable::Deletion::~Deletion() {
  MutexLock lock(&table_->mutex_);
  table_->deleting_.erase(job_);
}

void JobTable::PutAgain(int server, const std::string& name) {
  const absl::StatusOr<std::shared_ptr<JobRuntime>> job = Find(name);
  if (!job.ok()) return;
  if (!environment_.is_leader()) {
    // While a job is created, the leader is the last to know it. Later it must have lost it.
    if ((*job)->position().epoch == 0) return;
    spdlog::warn("job {}: the step leader, server {}, does not know it: its directory is lost",
                 name, environment_.server_names[server]);
  }
  {
    MutexLock lock(&mutex_);
    if (deleting_.contains(name) || !jobs_.contains(name)) return;
    ++puts_again_[name];
  }
  environment_.peers->PutJob(server, (*job)->model()->definition()).IgnoreError();
  MutexLock lock(&mutex_);
  if (--puts_again_[name] == 0) puts_again_.erase(name);
  put_again_.SignalAll();
}

void JobTable::Tick() {
  for (const std::shared_ptr<JobRuntime>& job : List()) job->Tick();
}

absl::Status JobTable::Stop(std::chrono::steady_clock::time_point deadline) {
  {
    MutexLock lock(&mutex_);
    serving_ = false;
  }
  absl::Status first;
  for (const std::shared_ptr<JobRuntime>& job : List()) job->BeginStop();
  for (const std::shared_ptr<JobRuntime>& job : List()) {
    const absl::Status status = job->Stop(deadline);
    if (!status.ok())
      spdlog::error("job {}: not flushed: {}", job->model()->job(), std::string(status.message()));
    if (first.ok()) first = status;
  }
  return first;
}

}  // namespace orlop::server
