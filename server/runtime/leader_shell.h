// The shell of a job's Leader, on the first server by name: workers' calls that decide, and the
// record that outlives the leader's process.
//   Threads  all methods are safe from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <string>

#include "absl/status/statusor.h"
#include "server/durability/flush_schedule.h"
#include "server/job/job_model.h"
#include "server/runtime/machine_shell.h"
#include "server/step/leader.h"

namespace orlop::server {

class LeaderShell final : public MachineShell {
 public:
  // `owner` owns this shell, and lives while work of it is under way. `model`: as at start.
  LeaderShell(const Environment& environment, std::shared_ptr<const JobModel> model,
              step::JobRecord record, std::weak_ptr<void> owner, std::shared_ptr<JobDisk> disk,
              std::shared_ptr<LocalMessages> local);

  // ---- Workers and operators ----
  absl::Status ClaimRank(const step::JoinRequest& join);  // see Leader::ClaimRank
  // Each begins a request and returns its id (for Withdraw). None waits: the caller is called with
  // the leader's answer (server/step/leader.h), here or later.
  step::RequestId Join(const step::JoinRequest& join, Caller caller);
  step::RequestId Commit(const step::CommitRequest& commit, Caller caller);
  step::RequestId Abort(const step::AbortRequest& abort, Caller caller);
  step::RequestId Hold(const std::string& holder, int64_t step, int64_t duration_ms, Caller caller);
  step::RequestId AcceptRollback(int64_t to_step, Caller caller);
  step::RequestId Flush(Caller caller);
  // Answered OK once the job serves, or its memory is known to be lost.
  step::RequestId AwaitRecovery(Caller caller);

  step::JobStatusReport Status() const;
  // Not if the server itself is about to go back to a flush (Environment::accepts_rollback). The
  // same holds for Status().
  bool HasLostMemory() const;

  // ---- Life ----
  void OnMessage(int from, const step::Message& message);  // that is ForLeader
  int64_t epoch() const;
  void Tick();
  void Close();
  // Between the two, commits are answered Unavailable, and no step is decided. BeginConfigure
  // returns false, and changes nothing, if a decided step has not been committed yet. `model`: what
  // steps are decided by from now on; null: as before.
  bool BeginConfigure();
  void EndConfigure(std::shared_ptr<const JobModel> model);

 private:
  void Do(const step::Action& action) override REQUIRES(mutex_);
  void AfterEvent() override REQUIRES(mutex_);
  absl::StatusOr<std::string> ScalarsOf(const step::ScalarInputs& inputs) REQUIRES(mutex_);
  void PersistInPool(const step::PersistRecord& action);
  bool IsLost() const REQUIRES(mutex_);
  bool GoesBackByItself() const;
  void NoteFlush() REQUIRES(mutex_);
  void FlushIfDue();
  void AcceptRollbackIfTold();

  const std::weak_ptr<void> owner_;
  step::Leader leader_ GUARDED_BY(mutex_);
  std::shared_ptr<const JobModel> model_ GUARDED_BY(mutex_);
  bool is_configuring_ GUARDED_BY(mutex_) = false;
  FlushSchedule schedule_ GUARDED_BY(mutex_);
  int64_t flush_begin_ms_ GUARDED_BY(mutex_) = 0;            // of the flush under way; 0: none is
  int64_t flush_step_ GUARDED_BY(mutex_) = 0;                // of the last one
  std::set<step::RequestId> recoveries_ GUARDED_BY(mutex_);  // of AwaitRecovery, unanswered
  // ContributionsPerElement of `counted_layout_`, which takes long to count.
  std::shared_ptr<const step::Layout> counted_layout_ GUARDED_BY(mutex_);
  absl::StatusOr<int64_t> contributions_ GUARDED_BY(mutex_) = int64_t{1};
};

}  // namespace orlop::server
