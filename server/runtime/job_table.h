// The jobs of one server, by name. The table opens them from disk when the server starts, creates
// and deletes them when the leader says so, and finds them for every call.
//   Threads  all methods are safe from any thread.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/runtime/job_runtime.h"   // IWYU pragma: export
#include "server/runtime/piece_intake.h"  // IWYU pragma: export

namespace orlop::server {

class JobTable {
 public:
  explicit JobTable(const Environment& environment) : environment_(environment) {}

  const Environment& environment() const { return environment_; }

  // Opens every job that is in the data directory. Until then, no call finds a job. A job that
  // cannot be opened, because what is stored of it is damaged or was placed on another number of
  // servers, is quarantined: the log names it, its bytes stay on disk, and the others are opened.
  // After an error the server must not start.
  //   Status  ResourceExhausted (the memory budget became smaller), Cancelled, the disk's error
  absl::Status OpenAll();

  // Returns the job with this name.
  //   Status  NotFound (UNKNOWN_JOB), FailedPrecondition (QUARANTINED, with the reason),
  //           Unavailable (STOPPING: before OpenAll or after Stop was called)
  absl::StatusOr<std::shared_ptr<JobRuntime>> Find(const std::string& job) const;
  // As Find, on the step leader only.
  //   Status  as Find and CheckLeader
  absl::StatusOr<std::shared_ptr<JobRuntime>> FindOnLeader(const std::string& job) const;
  // Returns OK if this server is the step leader and serves.
  //   Status  FailedPrecondition (NOT_LEADER, with the leader's name), Unavailable (STOPPING)
  absl::Status CheckLeader() const;
  // Returns all jobs but those in quarantine, by ascending name.
  std::vector<std::shared_ptr<JobRuntime>> List() const;
  // Returns the jobs in quarantine, and why.
  std::map<std::string, absl::Status> Quarantined() const;

  // Creates a job on this server, or changes its configuration if `definition` has a later revision
  // than the present one; else no effect. Synced to disk when it returns.
  //   Status  AlreadyExists (CONFLICT: another manifest), ResourceExhausted (BUDGET, or this server
  //           has kMaxJobs jobs), Unavailable (STOPPING), InvalidArgument (as CheckDefinition), or
  //           as JobRuntime::Open and Configure
  absl::Status Put(const v1::JobDefinition& definition);
  // On the leader: calls Put on every server, on this one last. If one refuses, those before it get
  // their old definition back, or drop the new job, as far as they can be reached. Returns the
  // first error.
  absl::Status PutEverywhere(const v1::JobDefinition& definition);
  // Deletes a job, also one in quarantine, and all its bytes on this server. Sets `*existed`; no
  // error if it did not exist.
  //   Status  the disk's error. No call finds the job then, but its bytes may still be on disk, and
  //           a restart of the server may bring it back
  absl::Status Drop(const std::string& job, bool* existed);

  // Marks a job of the leader as being deleted while this object lives: PutAgain does nothing for
  // it, so that a server which has dropped the job does not get it back. The constructor waits for
  // calls of PutAgain for the job that are under way.
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
  // Sends the definition of a job to `server`, which has answered that it does not know the job;
  // waits for its answer. Does nothing if the job is unknown here or being deleted. An error is
  // ignored, since the server will answer so again.
  void PutAgain(int server, const std::string& job);

  // Calls JobRuntime::Tick of every job. The server's ticker calls it.
  void Tick();
  // Clean stop: refuses calls from now on, then stops and flushes all jobs side by side. `deadline`
  // as for JobRuntime::Stop. Returns OK if the state of every job is on disk, else the first error;
  // the other jobs are flushed nevertheless.
  absl::Status Stop(std::chrono::steady_clock::time_point deadline);

 private:
  absl::Status CheckDefinition(const v1::JobDefinition& definition) const;
  absl::Status OpenStored(const std::string& job, const std::string& definition);
  absl::Status Insert(const v1::JobDefinition& definition, bool is_new);

  const Environment environment_;
  mutable Mutex mutex_;
  Mutex change_mutex_;                       // one Put or Drop at a time; taken before mutex_
  bool serving_ GUARDED_BY(mutex_) = false;  // between OpenAll and Stop
  std::map<std::string, std::shared_ptr<JobRuntime>> jobs_ GUARDED_BY(mutex_);
  std::map<std::string, absl::Status> quarantined_ GUARDED_BY(mutex_);
  std::set<std::string> deleting_ GUARDED_BY(mutex_);
  std::map<std::string, int> puts_again_ GUARDED_BY(mutex_);  // calls of PutAgain under way, by job
  CondVar put_again_;                                         // one of them has ended
};

}  // namespace orlop::server
