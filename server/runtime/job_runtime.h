// One job on one server: the shell around its step machines. It turns calls into events, carries
// out the machines' actions, and keeps callers waiting until they are answered. The first server by
// name runs the Leader too.
//
// Every event runs under one mutex, and so do its actions, in order. Staging, applying, flushing
// and every write to the disk go to the thread pool and come back as events; messages to other
// servers leave after the mutex. Neither bytes nor disks are waited for under it.
//   Threads  all methods are safe from any thread.
//   Next     a push goes on in server/shards/shard_store.h, a decision in server/step/leader.h.
#pragma once

#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/job/job_model.h"
#include "server/runtime/apply_queue.h"
#include "server/runtime/environment.h"
#include "server/runtime/piece_intake.h"
#include "server/runtime/step_scalars.h"
#include "server/runtime/wait.h"
#include "server/shards/shard_store.h"
#include "server/step/leader.h"
#include "server/step/participant.h"

namespace orlop::server {

struct StepTimes {
  int64_t step = -1;
  double stage_seconds = 0, decide_seconds = 0, apply_seconds = 0;
};

class JobRuntime : public std::enable_shared_from_this<JobRuntime> {
 public:
  // A version of a shard that can be read: the next apply of the shard waits while this lives, for
  // a second at most.
  class VersionPin {
   public:
    VersionPin(std::shared_ptr<JobRuntime> job, step::RequestId pull)
        : job_(std::move(job)), pull_(pull) {}
    VersionPin(VersionPin&&) = default;
    ~VersionPin() {
      if (job_ != nullptr) job_->Unpin(pull_);
    }

   private:
    std::shared_ptr<JobRuntime> job_;
    step::RequestId pull_;
  };

  // Opens a job as its definition says, with what the last clean stop left of it. `is_new`: just
  // created, nothing is on disk.
  //   Status  ResourceExhausted (BUDGET), DataLoss, InvalidArgument.
  static absl::StatusOr<std::shared_ptr<JobRuntime>> Open(const Environment& environment,
                                                          v1::JobDefinition definition,
                                                          bool is_new);
  // Starts the machines: recovery begins here, and what the last clean stop left is no longer all.
  //   Status  ResourceExhausted, DataLoss: the disk cannot note it, nothing has started.
  absl::Status Start();

  std::shared_ptr<const JobModel> model() const;
  ShardStore& shards() { return *shards_; }
  bool is_leader() const { return leader_ != nullptr; }

  // A new optimizer configuration (checked by the leader). ResourceExhausted: the old one stays.
  absl::Status Configure(v1::JobDefinition definition);

  // ---- Workers, on the leader ----
  absl::Status ClaimRank(const step::JoinRequest& join);  // see Leader::ClaimRank
  absl::StatusOr<step::Answer> Join(const step::JoinRequest& join, const Wait& wait);
  absl::StatusOr<step::Answer> Commit(const step::CommitRequest& commit, const Wait& wait);
  absl::StatusOr<step::Answer> Abort(const step::AbortRequest& abort, const Wait& wait);
  absl::StatusOr<step::Answer> Hold(const std::string& holder, int64_t step, int64_t duration_ms,
                                    const Wait& wait);
  absl::StatusOr<step::Answer> AcceptRollback(int64_t to_step, const Wait& wait);
  step::JobStatusReport Status() const;
  bool HasLostMemory() const { return Status().has_lost_memory; }
  // Waits until the job serves, or its memory is known to be lost.
  void AwaitRecovery(const Wait& wait) const;

  // ---- Workers, on an owner ----
  // Whether `key` names the open attempt (Participant::CheckKey). Never blocks: if the verdict is
  // *later*, `wakeup` is woken when the job's state has changed.
  step::KeyVerdict CheckKey(const step::AttemptKey& key, const std::shared_ptr<Wakeup>& wakeup);
  // Whether a piece is of the open attempt, expected and new, and where its bytes go. Waits neither
  // for another server nor for an apply: the answer is *later* then, and `wakeup` is woken when the
  // job's state has changed. May wait for the disk if memory is short, without the job's lock.
  //   Status  as Participant::CheckKey and CheckPush, ShardStore::BeginGradient and BeginLoad. A
  //           conflict of contents shows only in EndPiece.
  BegunPiece BeginPiece(const PieceRequest& request, const std::shared_ptr<Wakeup>& wakeup);
  // Stores a piece all of whose bytes its writer has. Returns whether it was stored before.
  //   Status  as PieceWriter::Finish and Keep, and Participant::OnPush.
  absl::StatusOr<bool> EndPiece(PieceTicket ticket, const Digest128& digest, const Wait& wait);
  // Waits until `version` of a shard can be read. A reader needs the pin until it has opened: then
  // it keeps the version by holding buffers, and the apply need not wait.
  absl::StatusOr<VersionPin> AwaitVersion(int32_t shard, int64_t version, const Wait& wait);
  // The staged pieces of this server's shards from one rank, by shard.
  std::vector<step::StagedPiece> PiecesFrom(uint32_t rank, size_t* expected_count) const;
  step::Position position() const;  // as this server knows it
  int64_t incarnation() const;
  bool HasReported() const;  // to the present epoch, what this process holds
  std::shared_ptr<const step::Layout> layout() const;
  StepTimes last_step() const;
  // How often the job's lock was taken: for tests and benchmarks.
  uint64_t lock_count() const { return mutex_.takes(); }
  // Updates that a tensor has seen, as of the last decision applied here.
  int64_t AppliedCount(uint32_t tensor) const;

  // ---- Life ----
  void OnPeer(int from, const step::Message& message);
  void Tick();
  // Clean stop: refuses new work, finishes what is decided, flushes. BeginStop does not wait.
  void BeginStop();
  // Waits until that is done: for other servers and for room on the disk until `deadline`, for the
  // flush as long as it takes. OK only when all is on disk, and noted under CleanKey.
  absl::Status Stop(std::chrono::steady_clock::time_point deadline);
  // The job was deleted: callers are answered NotFound, late completions ignored.
  void Close();

 private:
  struct Waiter {
    bool done = false;
    bool serve = false;
    step::Answer answer;
  };
  using Event = std::function<void(step::RequestId, int64_t now_ms, step::Actions*)>;

  JobRuntime(const Environment& environment, std::shared_ptr<const JobModel> model);
  absl::Status Restore(bool is_new);
  void StartLeader(step::JobRecord record) REQUIRES(mutex_);

  void Unpin(step::RequestId pull);
  absl::StatusOr<step::Answer> Ask(const Wait& wait, const Event& event,
                                   const Event& on_timeout = nullptr);
  absl::Status Await(step::RequestId request, const Waiter& waiter, const Wait& wait,
                     const Event& on_timeout);
  void Complete(const std::function<void(int64_t now_ms, step::Actions*)>& event);
  void SendToPeers(const std::vector<step::Send>& messages);
  void Perform(step::Actions actions) REQUIRES(mutex_);
  void Deliver(int from, const step::Message& message, step::Actions* more) REQUIRES(mutex_);
  void Do(const step::Send& action, step::Actions* more) REQUIRES(mutex_);
  void Do(const step::Answer& action, step::Actions* more) REQUIRES(mutex_);
  void Do(const step::PersistEpoch& action, step::Actions* more) REQUIRES(mutex_);
  void Do(const step::TakeLayout& action, step::Actions* more) REQUIRES(mutex_);
  void TakeInPool(const std::shared_ptr<const step::Layout>& layout, const JobModel& model);
  void Do(const step::StageShard& action, step::Actions* more) REQUIRES(mutex_);
  void Do(const step::DropStaged& action, step::Actions* more) REQUIRES(mutex_);
  void Do(const step::Serve& action, step::Actions* more) REQUIRES(mutex_);
  void Do(const step::LoadFlush& action, step::Actions* more) REQUIRES(mutex_);
  void Do(const step::WriteFlush& action, step::Actions* more) REQUIRES(mutex_);
  void Do(const step::PersistRecord& action, step::Actions* more) REQUIRES(mutex_);
  bool IsSynced(const absl::Status& status, step::Action action) REQUIRES(mutex_);
  template <typename Other>
  void Do(const Other& action, step::Actions* more) REQUIRES(mutex_);
  void PersistInPool(const step::PersistEpoch& action);
  void PersistInPool(const step::PersistRecord& action);
  void LoadFlushInPool(const step::LoadFlush& action);
  void WriteFlushInPool();
  void StageInPool(const step::StageShard& action, const absl::StatusOr<StagedShard>& staged);
  void EndApply(int32_t shard, const step::DecisionPtr& decision, const absl::Status& status);
  absl::Status CheckRequest(const PieceRequest& request, step::PushPiece* piece) const
      REQUIRES(mutex_);
  absl::StatusOr<int32_t> RegionOf(const PieceRequest& request) const REQUIRES(mutex_);
  int64_t now_ms() const;

  const Environment environment_;
  const std::string job_;
  std::unique_ptr<ShardStore> shards_;
  std::unique_ptr<ApplyQueue> applies_;
  mutable Mutex mutex_;
  mutable CondVar changed_;
  std::shared_ptr<const JobModel> model_ GUARDED_BY(mutex_);
  std::unique_ptr<step::Participant> participant_ GUARDED_BY(mutex_);
  std::unique_ptr<step::Leader> leader_;  // set once before Start
  std::shared_ptr<const step::Layout> layout_ GUARDED_BY(mutex_);
  absl::StatusOr<int64_t> contributions_ GUARDED_BY(mutex_) = int64_t{1};
  std::map<step::RequestId, std::shared_ptr<Waiter>> waiters_ GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<Wakeup>> sleepers_ GUARDED_BY(mutex_);  // answered *later*
  std::vector<step::Send> outgoing_ GUARDED_BY(mutex_);  // to other servers, of this event
  step::RequestId next_request_ GUARDED_BY(mutex_) = 1;
  // Small values that the disk refused, to be written with the next tick, and why.
  std::vector<step::Action> unsynced_ GUARDED_BY(mutex_);
  absl::Status unsynced_status_ GUARDED_BY(mutex_);
  bool flushing_ GUARDED_BY(mutex_) = false;
  absl::Status flush_status_ GUARDED_BY(mutex_);
  bool closed_ GUARDED_BY(mutex_) = false;
  // A new configuration is being made: pieces and commits wait, and messages to the participant are
  // held until it is there.
  bool configuring_ GUARDED_BY(mutex_) = false;
  std::vector<std::pair<int, step::Message>> held_ GUARDED_BY(mutex_);
  Mutex disk_mutex_;  // one write of epoch or record at a time; never taken under mutex_
  bool may_write_ GUARDED_BY(disk_mutex_) = true;
  int64_t record_version_ GUARDED_BY(disk_mutex_) = 0;
  StepTimes times_ GUARDED_BY(mutex_);
  int64_t first_byte_ms_ GUARDED_BY(mutex_) = 0, staged_ms_ GUARDED_BY(mutex_) = 0,
                         committed_ms_ GUARDED_BY(mutex_) = 0;
  int64_t committed_step_ GUARDED_BY(mutex_) = -1;  // that committed_ms_ is of
};

}  // namespace orlop::server
