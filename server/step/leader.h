// The step leader of a job: it forms generations, collects commits and staged reports, builds the
// decision record, drives prepare and apply, and recovers. Runs on one server of the job at a time;
// all it must remember is in the JobRecord and in the participants.
//
// A pure machine: each event changes the state and appends actions; no socket, disk, clock or
// thread inside. Not thread-safe: the shell serialises events.
//
// Invariants
//   - a record is sent to nobody before every in-sync copy of every shard is staged
//   - once sent, this leader only repeats it; only a recovery under a higher epoch may discard it
//   - a step is acknowledged only when every in-sync copy of every shard has it prepared
//   - a copy leaves the in-sync list (synced) before anything commits without it
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/step/actions.h"
#include "server/step/decision.h"
#include "server/step/gathering.h"
#include "server/step/job.h"
#include "server/step/messages.h"
#include "server/step/recovery.h"
#include "server/step/requests.h"  // IWYU pragma: export

namespace orlop::step {

inline constexpr size_t kMaxHolders = 1024;  // of one job at a time

struct LeaderOptions {
  int64_t resend_ms = 1000;                // repeat an unanswered message
  int64_t copy_timeout_ms = 10000;         // a silent copy is removed if another one is in sync
  int64_t max_hold_ms = 600000;            // longest Hold
  uint64_t max_layout_bytes = UINT64_MAX;  // of EncodedBytes
};

struct JobStatusReport {
  Position position;
  int64_t applied_step = kLoading;  // lowest version of any shard, as far as servers have told
  int64_t generation_issued = 0;    // the newest, formed or not; 0: none
  bool serving = false;
  // When not serving: the reason, in words ("shard 3: no in-sync copy ..."). When serving: the
  // damage of a shard, because of which no further step can be made; else empty.
  std::string waiting_for;
  bool is_stuck = false;  // every server has told what it holds, and it is not enough
  // True if the job is stuck because what was committed is gone, and an operator has to accept it.
  bool has_lost_memory = false;
  // Flushes common to all shards, newest first: what AcceptRollback may take.
  std::vector<RecoverReport::Flush> rollback_offers;
  DecisionPtr last_decision;
  std::vector<Rank> joined_ranks;     // whose Join of the newest generation has arrived
  std::vector<Rank> committed_ranks;  // whose CommitStep of the open attempt has arrived
  Placement in_sync;
};

class Leader {
 public:
  // Takes over a job: `record` as the store holds it (a new one has version 0). Recovery begins
  // with the first OnTick. `self` is the server this leader runs on.
  Leader(std::shared_ptr<const JobSpec> spec, ServerId self, JobRecord record,
         ScalarBuilder build_scalars, LeaderOptions options);

  // Any message that is ForLeader.
  void OnMessage(ServerId from, const Message& message, int64_t now_ms, Actions* actions);

  // `ok` false: the store holds another version: this leader has been replaced and stops for good
  // (deposed()); every waiting and later request is answered Unavailable.
  void OnRecordPersisted(int64_t version, bool ok, int64_t now_ms, Actions* actions);

  // Repeats what is unanswered, finds silent copies, ends holds. Call every resend_ms / 4 or so.
  void OnTick(int64_t now_ms, Actions* actions);

  // Each is answered exactly once. While recovering or forming, requests are answered Unavailable
  // (retry) or wait, as said.

  // Gives the join's rank to its client, as OnJoin does. Other fields of `join` may be incomplete.
  //   AlreadyExists       another client holds the rank
  absl::Status ClaimRank(const JoinRequest& join);

  // If join.generation is 0, the answer has a new generation number. Else the request waits until
  // all ranks of the generation have joined, a decision under way has committed, and every server
  // has opened the generation; then the answer is OK with the position.
  //   InvalidArgument     bad rank or world size, or a layout that ValidateLayout refuses (to all)
  //   AlreadyExists       this rank has joined this generation with another layout, or another
  //                       client holds it
  //   FailedPrecondition  generation not issued, or superseded
  //   DataLoss            min_committed_step above the committed step, not accepted
  void OnJoin(RequestId request, const JoinRequest& join, int64_t now_ms, Actions* actions);

  // Waits for all contributors and all shards; OK when committed. A repeated one of the last
  // committed step returns its decision; one of the open attempt replaces the caller's earlier
  // wait.
  //   InvalidArgument     unknown rank or tensor; a hyper-parameter, scale or kind that differs
  //                       from another contributor's (named)
  //   AlreadyExists       the rank's own earlier CommitStep of this attempt differs, or it pushed a
  //                       tensor it calls absent
  //   Aborted             an older generation, or another attempt; position names the open one
  //   FailedPrecondition  an older epoch; another step; a generation that has not formed; LOADING
  //                       and not a LOAD
  //   Unavailable         recovering
  //   any code            a shard of some server is damaged: no later step can be made
  void OnCommitStep(RequestId request, const CommitRequest& commit, int64_t now_ms,
                    Actions* actions);

  // Drops what is staged for (step, attempt) and opens the next attempt; OK when every server has.
  // An attempt already over: OK at once. FailedPrecondition: it is decided, another step, or an
  // attempt or generation that is still to come.
  void OnAbortStep(RequestId request, const AbortRequest& abort, int64_t now_ms, Actions* actions);

  // Delays the apply of step + 1 until `deadline_ms` (on now_ms' clock; in the past: releases).
  // Each holder has one hold, its latest; the apply waits for all. A recovery applies what is
  // committed, held or not. OutOfRange: a later step may already be applied. ResourceExhausted:
  // over kMaxHolders.
  void OnHold(RequestId request, const std::string& holder, int64_t step, int64_t deadline_ms,
              int64_t now_ms, Actions* actions);

  // Operator: go back to a flush common to all shards, or accept the loss a Join reported (to_step
  // = the committed step). Answered when recovered; a repeat is answered alike. FailedPrecondition:
  // nothing was lost, or no flush of to_step is common to all shards. Unavailable: not every server
  // has reported. DataLoss: a flush that was offered cannot be read.
  void OnAcceptRollback(RequestId request, int64_t to_step, int64_t now_ms, Actions* actions);

  // Has every server write the committed step to disk, once it is applied. The next step is not
  // applied before that is done; its pieces and its commit go on. OK: all servers have it, and it
  // is what a rollback can go back to; the position names the step. Two requests may share a flush.
  // FailedPrecondition: LOADING. Unavailable: recovering, also if a server is lost meanwhile. Any
  // other code: a server could not write.
  void OnFlush(RequestId request, int64_t now_ms, Actions* actions);

  JobStatusReport Status() const;
  // Two of its fields, without the cost of the others.
  bool serving() const { return phase_ == Phase::kServing && !deposed_; }
  bool has_lost_memory() const { return HaveAllReported() && IsLost(); }
  bool is_flushing() const { return flush_.has_value(); }
  // The newest flush that all servers have. Empty decision: there is none, or it is not known yet.
  const RecoverReport::Flush& kept_flush() const { return kept_flush_; }
  int64_t committed_step() const { return committed_ == nullptr ? kLoading : committed_->step; }
  bool is_deciding() const { return decision_ != nullptr; }  // it is prepared, not yet committed
  bool deposed() const { return deposed_; }
  // Of the newest generation that has formed; null: none has.
  const std::shared_ptr<const Layout>& layout() const { return record_.layout; }
  int64_t epoch() const { return record_.epoch; }

 private:
  enum class Phase : uint8_t {
    kNewEpoch,  // the record with the raised epoch is being persisted
    kCollect,   // Recover sent; reports come in, perhaps not enough of them yet
    kRollBack,  // Restore sent, of an accepted rollback
    kNarrow,    // the record with the copies that carry on is being persisted
    kPrepare,   // discards, and the committed decision prepared again everywhere
    kFinish,    // Apply of the committed decision everywhere
    kCatchUp,   // copies out of sync fetch the committed state
    kWiden,     // the record with the caught-up copies is being persisted
    kOpen,      // OpenJob sent
    kServing,
  };

  // What the leader knows of a server in this epoch.
  struct Server {
    bool prepared = false;  // decision_ (or, recovering, the committed one)
    bool applied = true;    // the committed decision
    absl::Status damage;    // why it cannot be applied there
    bool discarded = false;
    bool opened = false;  // OpenReply for (generation, committed step, attempt)
    bool restored = false;
    bool restore_failed = false;
    bool caught_up = false;
    bool catch_up_failed = false;
    bool sealed = false;
    bool flushed = false;               // FlushReply for flush_
    std::vector<uint8_t> absent_known;  // by rank: Absent was answered
    std::optional<StageReport> staged;
    int64_t heard_ms = 0;
    int64_t sent_ms = INT64_MIN / 2;  // last (re)sending
  };
  struct Commit {
    bool present = false;
    CommitRequest request;
    std::vector<RequestId> waiting;
  };
  // Why an attempt failed: a CommitStep that comes too late for it learns it too.
  struct Failure {
    int64_t step = kLoading;
    int64_t attempt = 0;
    std::string why;
  };
  struct PendingJoin {
    RequestId request;
    JoinRequest join;
  };
  struct Held {
    int64_t step;
    int64_t until_ms;
  };
  // leader_recovery.cc
  void BeginEpoch(int64_t now_ms, Actions* actions);
  absl::Status Recovering() const;  // the answer to whoever must wait for the recovery
  void Persist(Actions* actions);
  void EnterCollect(int64_t now_ms, Actions* actions);
  void Collect(int64_t now_ms, Actions* actions);
  bool IsSettled(const Copy& copy, int64_t now_ms) const;
  bool HaveAllReported() const;
  void AdoptPresentCopies();
  void CheckGeneration();
  bool HoldsRollback() const;
  // What was committed is gone: all in-sync copies of some shard were in processes that have ended,
  // as their servers have reported, or copies contradict one another. During a rollback: every
  // server has reported, and the state to go back to is gone too.
  bool IsLost() const;
  void StartRollBack(int64_t now_ms, Actions* actions);
  void CheckRollBack(int64_t now_ms, Actions* actions);
  void EnterPrepare(int64_t now_ms, Actions* actions);
  void EnterFinish(int64_t now_ms, Actions* actions);
  void EnterCatchUp(int64_t now_ms, Actions* actions);
  void EnterOpen(int64_t now_ms, Actions* actions);
  void EnterServing(int64_t now_ms, Actions* actions);
  void Advance(int64_t now_ms, Actions* actions);
  void ChooseAttempt();
  bool HoldsInSync(ServerId server) const;
  bool IsInSync(ShardId shard, ServerId server) const;
  bool IsBehind(ServerId server) const;
  bool NeedsCatchUp(ServerId server) const;
  bool CanSpare(ServerId server) const;
  void FindSilentCopies(int64_t now_ms, Actions* actions);
  void SendWanted(int64_t now_ms, Actions* actions);
  bool WantedMessage(ServerId server, int64_t now_ms, Message* message) const;
  CatchUp CatchUpMessage(ServerId server) const;
  OpenJob OpenMessage() const;
  void Resend(ServerId server) { servers_[server].sent_ms = INT64_MIN / 2; }

  void On(ServerId from, const Register& message, int64_t now_ms, Actions* actions);
  void On(ServerId from, const RecoverReport& message, int64_t now_ms, Actions* actions);
  void On(ServerId from, const StageReport& message, int64_t now_ms, Actions* actions);
  void On(ServerId from, const RestoreReply& message, int64_t now_ms, Actions* actions);
  void On(ServerId from, const CatchUpReply& message, int64_t now_ms, Actions* actions);
  void On(ServerId from, const OpenReply& message, int64_t now_ms, Actions* actions);
  void On(ServerId from, const FlushReply& message, int64_t now_ms, Actions* actions);
  void On(ServerId from, const AbsentReply& message, int64_t now_ms, Actions* actions);
  void On(ServerId from, const SealReply& message, int64_t now_ms, Actions* actions);
  void On(ServerId from, const Prepared& message, int64_t now_ms, Actions* actions);
  void On(ServerId from, const Applied& message, int64_t now_ms, Actions* actions);
  void On(ServerId from, const Discarded& message, int64_t now_ms, Actions* actions);
  void On(ServerId from, const Fenced& message, int64_t now_ms, Actions* actions);

  // leader.cc
  int64_t step() const { return committed_step() + 1; }
  bool AllServers(bool Server::*flag) const;  // of those with an in-sync copy
  void Reply(RequestId request, absl::Status status, Actions* actions) const;
  void ReplyCommitted(RequestId request, Actions* actions) const;
  void ReplyAll(std::vector<RequestId>* requests, const absl::Status& status, Actions* actions);
  void FailCommits(const absl::Status& status, Actions* actions);
  void ForgetAttempt();
  void OpenNextAttempt(const absl::Status& status, Actions* actions);
  void FailAttempt(const absl::Status& why, Actions* actions);
  void HandleJoin(const PendingJoin& pending, int64_t now_ms, Actions* actions);
  absl::Status CheckMinCommitted(int64_t min_committed_step);
  void MaybeInstallGeneration(int64_t now_ms, Actions* actions);
  absl::Status CheckCommit(const CommitRequest& commit) const;
  bool AllCommitted() const;
  absl::Status Damage() const;  // of some server, in making the committed step; OK if none
  void MaybeDecide(int64_t now_ms, Actions* actions);
  void MaybeCommit(int64_t now_ms, Actions* actions);
  void EndFlush(const absl::Status& status, Actions* actions);
  bool MayApply(int64_t now_ms) const;

  std::shared_ptr<const JobSpec> spec_;
  ServerId self_;
  JobRecord record_;
  ScalarBuilder build_scalars_;
  LeaderOptions options_;
  bool deposed_ = false;

  Phase phase_ = Phase::kNewEpoch;
  bool started_ = false;
  bool persisting_ = false;
  bool new_epoch_wanted_ = false;  // as soon as the write under way is done
  int64_t epoch_seen_ = 0;         // highest that any server has told
  int64_t phase_ms_ = 0;           // when the phase began
  Reports reports_;
  Verdict verdict_;
  int64_t discard_attempt_ = 0;  // of step(), by the recovery under way; 0: none
  std::vector<Server> servers_;
  std::shared_ptr<const Placement> placement_;

  DecisionPtr committed_;
  std::optional<CommitRequest>
      committed_request_;  // the one that made committed_, if known; repeats must agree with it
  int64_t attempt_ = 0;    // of step()
  DecisionPtr decision_;   // sent for preparation, not yet committed
  std::vector<Commit> commits_;  // by rank
  Failure last_failure_;
  std::string recovery_cause_;  // of the recovery under way, if callers must know it; else empty
  std::vector<RequestId> aborts_;
  std::vector<RequestId> rollbacks_;
  std::vector<PendingJoin> joins_;    // wait until serving
  std::vector<RequestId> opening_;    // joins of the formed generation, wait for OpenReplies
  std::vector<RequestId> issuing_;    // generation being persisted
  std::vector<RequestId> accepting_;  // accepted loss being persisted
  Gathering gathering_;
  bool installing_ = false;  // the record with the new generation is being persisted
  int64_t claimed_loss_ = kLoading;
  std::map<std::string, Held> holds_;  // by holder
  std::vector<RequestId> flush_requests_;
  std::optional<RecoverReport::Flush> flush_;  // is being written
  RecoverReport::Flush kept_flush_;
  Digest failed_flush_;  // the last one of this epoch that a server could not write
};

}  // namespace orlop::step
