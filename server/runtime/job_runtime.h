// One job on one server: its bytes, and the shell around its Participant. It turns calls into
// events, carries out the machine's actions, and keeps callers waiting until they are answered. On
// the first server by name it owns the shell of the job's Leader too.
//
// Every event of the participant runs under the job's lock, and so do its actions, in order.
// Staging, applying, flushing and every write to the disk go to the thread pool and come back as
// events; messages leave after the lock. Neither bytes nor disks are waited for under it.
//   Threads  all methods are safe from any thread.
//   Next     a push goes on in server/shards/shard_store.h, a decision in server/step/leader.h.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/durability/flush.h"
#include "server/durability/flush_room.h"
#include "server/job/job_model.h"
#include "server/runtime/apply_queue.h"
#include "server/runtime/job_opening.h"
#include "server/runtime/leader_shell.h"   // IWYU pragma: export
#include "server/runtime/machine_shell.h"  // IWYU pragma: export
#include "server/runtime/piece_intake.h"
#include "server/runtime/wait.h"
#include "server/shards/shard_store.h"
#include "server/step/participant.h"

namespace orlop::server {

struct StepTimes {
  int64_t step = -1;
  double stage_seconds = 0, decide_seconds = 0, apply_seconds = 0;
};

class JobRuntime final : public MachineShell, public std::enable_shared_from_this<JobRuntime> {
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
  // Whether this server's store came back without its newest writes when the process started.
  bool has_lost_writes() const { return environment_.data->has_lost_writes(); }
  // Bytes that the disk does not have for the flushes of this job; 0: it has them.
  uint64_t missing_flush_bytes() const { return flush_room_.missing_bytes(); }
  // Null on every server but the first by name.
  LeaderShell* leader() const { return leader_.get(); }

  // A new optimizer configuration (checked by the leader). ResourceExhausted: the old one stays.
  absl::Status Configure(v1::JobDefinition definition);

  // ---- Workers ----
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
  // Asks for `version` of a shard; `next` gets a pin when it can be read, here or later in another
  // thread. A reader needs the pin until it has opened: then it keeps the version by holding
  // buffers, and the apply need not wait. Returns the request, for Withdraw.
  step::RequestId AskVersion(int32_t shard, int64_t version,
                             std::chrono::steady_clock::time_point deadline,
                             std::function<void(absl::StatusOr<VersionPin>)> next);
  // The same for a caller that waits.
  absl::StatusOr<VersionPin> AwaitVersion(int32_t shard, int64_t version, const Wait& wait);
  // The staged pieces of this server's shards from one rank, by shard.
  std::vector<step::StagedPiece> PiecesFrom(uint32_t rank, size_t* expected_count) const;
  step::Position position() const;  // as this server knows it
  bool HasReported() const;         // to the present epoch, what this process holds
  std::shared_ptr<const step::Layout> layout() const;
  StepTimes last_step() const;
  // Updates that a tensor has seen, as of the last decision applied here.
  int64_t AppliedCount(uint32_t tensor) const;

  // ---- Life ----
  // A message from another server of the cluster. Nothing of a refused one is used.
  //   Status  InvalidArgument     CheckPeerMessage refuses it (step/check.h)
  //           FailedPrecondition  a Recover for another manifest than this server's job has
  absl::Status OnPeerMessage(int from, const step::Message& message);
  // True if the last Recover was for another manifest: this server's job is not the one that the
  // step leader has under the name. It is so until one of them is deleted.
  bool IsForeign() const { return is_foreign_; }
  // What became of a message that this server has sent: the answer of server `to`, or why it could
  // not be sent. A refusal is logged once, and kept until a message of the same kind gets through.
  void OnPeerAnswer(int to, const v1::StepMessage& message, const absl::Status& answer);
  // The refusals kept now, by server.
  std::map<int, absl::Status> refusals() const;
  void Tick();
  // Clean stop: refuses new work, finishes the applies that have begun, and flushes. A step that is
  // prepared but whose Apply has not come is flushed as that. BeginStop
  // waits for messages between the two machines here only.
  void BeginStop();
  // Waits until that is done: for other servers and for room on the disk until `deadline`, for the
  // applies and the flush as long as they take. OK only when all is on disk, and noted under
  // CleanKey.
  absl::Status Stop(std::chrono::steady_clock::time_point deadline);
  // The job was deleted: callers are answered NotFound, late completions ignored.
  void Close();

 private:
  JobRuntime(const Environment& environment, std::shared_ptr<const JobModel> model,
             int64_t record_version);
  void Restore(OpenedJob opened);
  absl::Status CheckPeerMessage(int from, const step::Message& message) const;
  void OnMessage(int from, const step::Message& message);
  absl::Status BeginConfigure(const JobModel& model, bool is_deciding);
  absl::Status ConfigureShards(const JobModel& model, const JobModel& before);
  void Unpin(step::RequestId pull);
  step::RequestId AskVersion(int32_t shard, int64_t version, Caller caller);
  absl::StatusOr<VersionPin> PinOf(const absl::StatusOr<step::Answer>& answer);

  void Do(const step::Action& action) override REQUIRES(mutex_);
  void AfterEvent() override REQUIRES(mutex_);
  void Do(const step::PersistEpoch& action) REQUIRES(mutex_);
  void Do(const step::TakeLayout& action) REQUIRES(mutex_);
  void Do(const step::StageShard& action) REQUIRES(mutex_);
  void Do(const step::DropStaged& action) REQUIRES(mutex_);
  void Do(const step::StartApply& action) REQUIRES(mutex_);
  void Do(const step::Serve& action) REQUIRES(mutex_);
  void Do(const step::LoadFlush& action) REQUIRES(mutex_);
  void Do(const step::WriteFlush& action) REQUIRES(mutex_);
  void Do(const step::KeepFlushes& action) REQUIRES(mutex_);
  template <typename Other>
  void Do(const Other& action) REQUIRES(mutex_);
  void PersistInPool(const step::PersistEpoch& action);
  void TakeInPool(const std::shared_ptr<const step::Layout>& layout, const JobModel& model);
  absl::Status HoldLayout(const step::Layout& layout);
  void StageInPool(const step::StageShard& action, const absl::StatusOr<StagedShard>& staged);
  void EndApply(int32_t shard, const step::DecisionPtr& decision, const absl::Status& status);
  void LoadFlushInPool(const step::LoadFlush& action);
  void WriteFlushInPool(const step::WriteFlush& action);
  absl::Status WriteFlushOf(const FlushHeader& header, const step::WriteFlush& action,
                            bool* has_erased) EXCLUDES(flush_mutex_);
  uint64_t FlushBytesAs(const JobModel& model) const;
  absl::Status TakeFlushRoom(const JobModel& model, bool is_new);
  void KeepFlushesOf(const std::vector<int64_t>& steps) REQUIRES(flush_mutex_);
  absl::Status CheckPiece(const PieceRequest& request, step::PushPiece* piece) const
      REQUIRES(mutex_);

  Mutex flush_mutex_;  // one task writes or erases flushes at a time; taken before mutex_
  std::atomic<int64_t> flush_count_ = 0;  // WriteFlush actions until now
  FlushRoom flush_room_;
  std::unique_ptr<ShardStore> shards_;
  std::unique_ptr<ApplyQueue> applies_;
  std::unique_ptr<LeaderShell> leader_;  // set once, before Start
  std::shared_ptr<const JobModel> model_ GUARDED_BY(mutex_);
  std::unique_ptr<step::Participant> participant_ GUARDED_BY(mutex_);
  std::shared_ptr<const step::Layout> layout_ GUARDED_BY(mutex_);     // last taken, or refused
  Reservation layout_room_ GUARDED_BY(mutex_);                        // of layout_
  std::vector<std::shared_ptr<Wakeup>> sleepers_ GUARDED_BY(mutex_);  // answered *later*
  std::vector<step::StartApply> beginning_ GUARDED_BY(mutex_);        // of this event
  CondVar changed_;  // an event is over, or the job was deleted; Stop waits for it
  bool flushing_ GUARDED_BY(mutex_) = false;
  absl::Status flush_status_ GUARDED_BY(mutex_);
  // A new configuration is being made: pieces wait, and messages to the participant are held until
  // it is there.
  bool configuring_ GUARDED_BY(mutex_) = false;
  std::vector<std::pair<int, step::Message>> held_ GUARDED_BY(mutex_);
  // By server and kind of message.
  std::map<std::pair<int, int>, absl::Status> refusals_ GUARDED_BY(mutex_);
  std::atomic<bool> is_foreign_ = false;
  std::map<std::pair<int, int>, std::string> logged_refusals_ GUARDED_BY(mutex_);
  StepTimes times_ GUARDED_BY(mutex_);
  int64_t first_byte_ms_ GUARDED_BY(mutex_) = 0, staged_ms_ GUARDED_BY(mutex_) = 0,
                         committed_ms_ GUARDED_BY(mutex_) = 0;
  int64_t committed_step_ GUARDED_BY(mutex_) = -1;  // that committed_ms_ is of
};

}  // namespace orlop::server
