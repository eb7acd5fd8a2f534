// The jobs of one server: opened from disk at start, made and dropped by the leader, found by name
// by every call.
//   Threads  all methods are safe from any thread.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/runtime/job_runtime.h"

namespace orlop::server {

class JobTable {
 public:
  explicit JobTable(const Environment& environment) : environment_(environment) {}

  const Environment& environment() const { return environment_; }

  // Opens every job that the data directory knows. DataLoss, ResourceExhausted (the budget shrank),
  // FailedPrecondition (another list of peers): the server must not start.
  absl::Status OpenAll();

  // NotFound (UNKNOWN_JOB), or Unavailable (STOPPING) before OpenAll and after BeginStop.
  absl::StatusOr<std::shared_ptr<JobRuntime>> Find(const std::string& job) const;
  // The same on the leader; another server answers FailedPrecondition (NOT_LEADER) naming it.
  absl::StatusOr<std::shared_ptr<JobRuntime>> FindOnLeader(const std::string& job) const;
  absl::Status CheckLeader() const;
  std::vector<std::shared_ptr<JobRuntime>> List() const;

  // Makes a job, or a later revision of its configuration, known here, synced. The same again: no
  // effect.
  //   Status  AlreadyExists (CONFLICT: another manifest), ResourceExhausted (BUDGET; also for the
  //   1025th job).
  absl::Status Put(const v1::JobDefinition& definition);
  // The same on every server, this one last; what was made elsewhere is taken back when one
  // refuses.
  absl::Status PutEverywhere(const v1::JobDefinition& definition);
  // Forgets a job and its bytes. `*existed` is set.
  absl::Status Drop(const std::string& job, bool* existed);

  // On the leader: while it lives, no server is told of the job again, so that one that has dropped
  // it stays without. Waits for a PutAgain of the job that is under way.
  class Deletion {
   public:
    Deletion(JobTable* table, std::string job);
    ~Deletion();
    Deletion(const Deletion&) = delete;
    Deletion& operator=(const Deletion&) = delete;

   private:
    JobTable* const table_;
    const std::string job_;
  };
  // Another server says that it does not know this job: it is told, unless the job is unknown here
  // or being deleted. What fails is tried again when that server says so again.
  void PutAgain(int server, const std::string& job);

  void Tick();
  // Refuses calls from now on, brings every job to rest and flushes it, side by side; `deadline` is
  // JobRuntime::Stop's. OK only if all is on disk; a job that cannot be flushed costs no other its
  // state.
  absl::Status Stop(std::chrono::steady_clock::time_point deadline);

 private:
  absl::Status Insert(const v1::JobDefinition& definition, bool is_new);

  const Environment environment_;
  mutable Mutex mutex_;
  Mutex change_mutex_;  // one Put or Drop at a time; taken before mutex_
  bool serving_ GUARDED_BY(mutex_) = false;
  std::map<std::string, std::shared_ptr<JobRuntime>> jobs_ GUARDED_BY(mutex_);
  std::set<std::string> deleting_ GUARDED_BY(mutex_);
  std::map<std::string, int> puts_again_ GUARDED_BY(mutex_);  // under way
  CondVar put_again_;
};

}  // namespace orlop::server
