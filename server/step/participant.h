// The step machine of a participant. Every server has one for each job. It knows which version of
// every shard this server holds and which pieces are staged, follows the leader's messages
// (Prepare, Apply, Discard and others of messages.h), and says which version a pull may read.
// ARCHITECTURE.md has the terms ("Words") and the five states of a step ("A step").
//
// The machine is pure: it has no socket, disk, clock or thread. Its caller, the *shell* (JobRuntime
// in orlopd, the simulator in tests), holds the bytes. It calls an On... method for each event, and
// then carries out the actions (actions.h) that the method has appended to `*actions`. A *life* is
// the time from this object's construction to a clean stop or a crash. Times (`now_ms`) are in ms
// of one monotonic clock.
//   Threads  not thread-safe: the shell makes one call at a time.
//
// Invariants
//   - The machine obeys no message of a lower epoch than epoch(), and sends no RecoverReport before
//     its epoch is synced to disk.
//   - At most one decision is prepared. Its step is the last applied one + 1. While it is prepared,
//     no new piece is staged.
//   - A shard's applied step and the identity of the decision that made it change together.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "server/step/actions.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/messages.h"
#include "server/step/reason.h"

namespace orlop::step {

// Returns PieceKey::region of a LOAD piece: a 64-bit hash of its slot's name and its box.
uint64_t LoadRegion(std::string_view slot, const Box& box);

// A piece that is staged; its bytes are in memory or in a flush. The fields are those of PushPiece.
struct StagedPiece {
  PieceKey key;
  Digest payload;
  int64_t applied_count = -1;
};

// The state with which a participant begins. On a clean stop the shell writes Image() to disk
// together with the bytes of all shards, and the next process begins with it. After a crash the
// shell makes one from what is on disk: `epoch`, `incarnation` and `flushes` are set as below; all
// else is default unless the job's journal was replayed.
struct ParticipantImage {
  int64_t epoch = 0;        // the highest one that this server has synced
  int64_t incarnation = 0;  // of the last process that opened the job on this server; 0: none did
  // True: the fields below are the state at the end of the life before. False: this server has no
  // copy of that state (it crashed, or the job is new).
  bool has_memory = false;
  std::vector<ShardReport> shards;    // what this server holds of each of its shards
  DecisionPtr last_applied;           // null: none
  DecisionPtr prepared;               // null: none. The shell has its staged bytes
  int64_t discarded_step = kLoading;  // the highest (step, attempt) discarded; kLoading: none
  int64_t discarded_attempt = 0;
  // After a clean stop: the open attempt, of which the shell has all staged bytes. Else attempt 0.
  int64_t generation = 0;
  int64_t attempt = 0;
  bool is_load = false;             // its pieces are of SetState
  bool has_scale = false;           // false: no gradient piece has arrived
  double scale = 1.0;               // the loss scale of its gradient pieces
  Digest layout;                    // the layout that the shell has room for; empty: none
  std::vector<StagedPiece> pieces;  // of all shards
  // The tensors for which a rank has declared that it has no gradient.
  struct AbsentTensors {
    Rank rank = 0;
    std::vector<TensorId> tensors;  // ascending
  };
  std::vector<AbsentTensors> absent;
  std::vector<RecoverReport::Flush> flushes;  // the whole, undamaged ones on this server's disk
};

// One record of a job's journal (levels kJournaled and kReplicatedJournaled).
struct JournalRecord {
  enum class Type : uint8_t { kPrepared, kDiscarded, kApplied } type = Type::kPrepared;
  DecisionPtr decision;  // kPrepared; kApplied: all shards of the server have applied it
  int64_t step = 0;      // kDiscarded: this attempt and all lower ones of this step
  int64_t attempt = 0;   // kDiscarded
};
// What a restarted server does with its journal: it applies the decisions `applied` to the state at
// `base_step`, in order, and then holds `prepared`, whose outcome it does not know.
struct JournalReplay {
  std::vector<DecisionPtr> applied;   // of steps base_step + 1, base_step + 2, ...
  DecisionPtr prepared;               // null: none
  int64_t discarded_step = kLoading;  // of the last kDiscarded record; kLoading: none
  int64_t discarded_attempt = 0;
};
// Reads a journal, whose records are in the order in which they were written. A decision was
// committed if it has a kApplied record or if a decision of a later step follows it. Committed
// decisions that do not continue base_step + 1, base_step + 2, ... are left out.
JournalReplay ReplayJournal(const std::vector<JournalRecord>& journal, int64_t base_step);

// Sets `*flush` to the step and decision of the flush that a clean stop with `image` writes.
// Returns false if no flush of one step exists: the server has no shard, a shard was never loaded,
// or two shards were made by different decisions.
bool FlushOf(const ParticipantImage& image, RecoverReport::Flush* flush);

// The attempt that a Push, a SetState or a QueryPush names.
struct AttemptKey {
  int64_t epoch = 0;       // the worker's; 0: the caller names none
  int64_t generation = 0;  // 0: any
  int64_t step = 0;
  int64_t attempt = 0;  // 0: any
};

// The result of comparing an AttemptKey with the attempt that is open on this server.
struct KeyVerdict {
  // True: the key names what this server may still come to, once a message of the leader arrives or
  // an apply ends. The caller should wait and compare again.
  bool is_later = false;
  // OK: the key names the open attempt. If `is_later`: the error for a caller that stops waiting.
  absl::Status status;
};

struct ParticipantOptions {
  int64_t resend_ms = 1000;  // the machine repeats an unanswered message after this time
  int64_t pin_ms = 1000;     // the longest time that one pull delays the apply of its shard
};

class Participant {
 public:
  // `fresh_incarnation`: a number that no server has used before. The machine takes it as its own
  // if !image.has_memory, and image.incarnation otherwise. The shell must have synced it and
  // image.epoch to disk before the first event. `leader`: the server to which the machine sends
  // Register until the Recover of a higher epoch arrives.
  Participant(std::shared_ptr<const JobSpec> spec, ServerId self, ServerId leader,
              const ParticipantImage& image, int64_t fresh_incarnation, ParticipantOptions options);

  // ---- Peers ----
  // A message has arrived from server `from`. Forward, which goes to OnForward, and messages for
  // the Leader (ForLeader) are ignored here, and so is every message after OnStop. A leader's
  // message of a lower epoch is answered with Fenced.
  void OnMessage(ServerId from, const Message& message, int64_t now_ms, Actions* actions);

  // ---- Workers ----
  // Compares a key with the open attempt, for pushes, SetState and queries alike. The columns are
  // the status, its Reason, whether is_later is set, and when this is the verdict:
  //   OK                                            the key names the open attempt
  //   FailedPrecondition  kStaleEpoch               the key's epoch is older
  //   FailedPrecondition  kLoading                  no generation has formed yet
  //   FailedPrecondition  kWrongStep or kLoading    the key's step is not the one being made
  //   FailedPrecondition  kStaleGeneration   later  the key's generation has not formed yet
  //   Aborted             kStaleGeneration          the key's generation is older
  //   Aborted             kStaleAttempt             the key's attempt is older
  //   Aborted             kStaleAttempt      later  the key's attempt is not open yet
  //   Unavailable                                   the job recovers, the server stops, or the
  //                                                 key's epoch is newer
  //   Unavailable                            later  the step before is still being applied
  //   Unavailable                            later  the shell is making room for the layout
  //   the error given to OnLayoutTaken              the shell has no room for the layout
  //   damage()                                      a shard is damaged. This replaces OK and later
  KeyVerdict CheckKey(const AttemptKey& key) const;

  // Checks a piece before its bytes are sent; changes nothing. OK means that this server needs the
  // bytes or, if `*stored` is set, that it has the same piece already. It does not compare the
  // boxes of LOAD pieces: the shell must refuse overlapping ones.
  //   InvalidArgument     the rank or region is not in the layout, the loss scale is not that of
  //                       the attempt's other pieces, or a gradient has an applied_count
  //   NotFound            this server has no in-sync copy of the shard, or is not its primary
  //   AlreadyExists       the key is stored with another payload, or the rank has declared the
  //                       tensor absent
  //   Aborted             the attempt or generation is older than the open one, or 0
  //   FailedPrecondition  the epoch is older, the step is another one or is decided, the attempt
  //                       has pieces of the other kind (gradients, LOAD), or a gradient came while
  //                       the job is LOADING
  //   Unavailable         any verdict *later* of CheckKey, or the job recovers, or the server stops
  //   others              the errors of the last two lines of CheckKey
  absl::Status CheckPush(const PushPiece& piece, bool* stored) const;

  // All bytes of a piece have arrived. `has_room`: the shell has memory for the piece and for the
  // apply; if false, the answer is ResourceExhausted and the attempt stays open. The request is
  // answered with an error of CheckPush, or with OK once every in-sync copy of the shard has the
  // piece. The shell keeps the bytes if and only if `*keep` is set.
  void OnPush(RequestId request, const PushPiece& piece, bool has_room, int64_t now_ms, bool* keep,
              Actions* actions);
  // As OnPush, for a piece that a Forward message has brought from the primary `from`. The primary
  // is answered with ForwardReply.
  void OnForward(ServerId from, const Forward& forward, bool has_room, int64_t now_ms, bool* keep,
                 Actions* actions);

  // A worker asks for exactly `version` of a shard. If this server holds it, the action is Serve,
  // and a pin delays the next apply of the shard until OnPullDone or for pin_ms. If it is the next
  // version, the request waits for it. Otherwise, or if the wait fails, the request is answered:
  //   OutOfRange          a later version has replaced it
  //   FailedPrecondition  the job is LOADING, or the version is further ahead
  //   Aborted             the attempt that was to make the version is gone, or the job went back
  //   NotFound            this server has no in-sync copy of the shard
  //   Unavailable         the job recovers, or the server stops
  //   damage()            this server cannot make the version
  void OnPull(RequestId request, ShardId shard, int64_t version, int64_t now_ms, Actions* actions);
  // The reader that Serve started has what it needs: the shard may be applied.
  void OnPullDone(RequestId request, int64_t now_ms, Actions* actions);
  // The caller has gone away or its deadline has passed. The request is not answered.
  void OnPullCancelled(RequestId request, int64_t now_ms, Actions* actions);

  // ---- Completions of actions ----
  // The disk has synced `epoch` (PersistEpoch).
  void OnEpochDurable(int64_t epoch, int64_t now_ms, Actions* actions);
  // The journal has synced the decision with this identity (PersistDecision).
  void OnDecisionDurable(const Digest& decision, int64_t now_ms, Actions* actions);
  // PersistDecision failed, and nobody knows whether the record is on disk. The machine sends
  // `status` to the leader. Only a recovery decides whether the step is committed.
  void OnPrepareFailed(const Digest& decision, absl::Status status, int64_t now_ms,
                       Actions* actions);
  // The journal has synced that this attempt is discarded (PersistDiscard).
  void OnDiscardDurable(int64_t step, int64_t attempt, int64_t now_ms, Actions* actions);
  // TakeLayout has ended. OK: the shell has room for the layout with this digest. An error answers
  // OpenJob and pushes, until the leader's next OpenJob makes the machine try again.
  void OnLayoutTaken(const Digest& layout, absl::Status status, int64_t now_ms, Actions* actions);
  // StageShard has succeeded. `staged` is its result; its fields `absent` and
  // `loaded_applied_count` are not read. Ignored if the attempt is no longer the open one.
  void OnShardStaged(int64_t step, int64_t attempt, const ShardStaged& staged, int64_t now_ms,
                     Actions* actions);
  // StageShard has failed, so no decision can be made of this attempt. The machine sends `status`
  // to the leader, repeatedly, until the leader opens the next attempt. Ignored if the attempt is
  // no longer the open one.
  void OnShardStagingFailed(ShardId shard, int64_t step, int64_t attempt, absl::Status status,
                            int64_t now_ms, Actions* actions);
  // StartApply has succeeded: the shard is at version `step`.
  void OnShardApplied(ShardId shard, int64_t step, int64_t now_ms, Actions* actions);
  // StartApply has failed for good. The version is committed, but this server can make neither it
  // nor a later one: the shard is damaged until a flush or another copy replaces it. Other shards
  // are not affected. `status` answers the pulls that wait for the shard and goes to the leader.
  void OnShardDamaged(ShardId shard, int64_t step, absl::Status status, int64_t now_ms,
                      Actions* actions);
  // FetchShard for `decision` has ended. An error goes to the leader; the copy stays out of sync.
  void OnShardFetched(ShardId shard, const Digest& decision, absl::Status status, int64_t now_ms,
                      Actions* actions);
  // LoadFlush for `decision` has ended. `restored`: the record of that decision, if status is OK.
  void OnFlushRestored(const Digest& decision, DecisionPtr restored, absl::Status status,
                       int64_t now_ms, Actions* actions);

  // ---- Life ----
  // Repeats messages that are unanswered for resend_ms, and ends expired pins. The shell calls it
  // about every resend_ms / 4.
  void OnTick(int64_t now_ms, Actions* actions);
  // Begins a clean stop. The machine refuses all new work, waits for the applies, writes and copies
  // under way, and then asks for WriteFlush. A machine that has lost its memory and holds nothing
  // new stops without a flush.
  void OnStop(int64_t now_ms, Actions* actions);
  // WriteFlush has ended. If it was that of a clean stop and has succeeded, stopped() is true from
  // now on. `has_erased`: the flushes that were not `needed` were erased before.
  void OnFlushed(absl::Status status, bool has_erased, int64_t now_ms, Actions* actions);
  bool stopped() const { return life_ == Life::kStopped; }
  // Whether a committed step is being applied here. Its end waits for nobody else.
  bool is_applying() const { return committed_; }

  // ---- State ----
  // The state for the flush of a clean stop, with has_memory true.
  ParticipantImage Image() const;
  // The highest epoch of which a Recover message has arrived.
  int64_t epoch() const { return epoch_; }
  // Whether this life has sent its RecoverReport in epoch().
  bool has_reported() const { return Joined(); }
  int64_t incarnation() const { return incarnation_; }
  Position position() const;
  // Sets the version of a shard and the identity of the decision that made it.
  // NotFound: no copy of this shard here.
  absl::Status AppliedOf(ShardId shard, int64_t* step, Digest* decision) const;
  // The status given to OnShardDamaged for the first damaged shard; OK if none is damaged. While a
  // shard is damaged the shards are of two versions, so that a clean stop asks for no flush and
  // stopped() stays false.
  absl::Status damage() const {
    return damaged_.empty() ? absl::OkStatus() : damaged_.begin()->second;
  }
  DecisionPtr prepared() const { return prepared_; }          // null: none
  DecisionPtr last_applied() const { return last_applied_; }  // null: none
  // The staged pieces of a shard by ascending rank, then region, for StageShard and QueryPush.
  // Empty if this server has no copy of the shard.
  std::vector<StagedPiece> PiecesOf(ShardId shard) const;
  // The ranks that have declared the shard's tensor absent in the open attempt, ascending.
  std::vector<Rank> AbsentOf(ShardId shard) const;

 private:
  enum class Life : uint8_t { kRunning, kDraining, kFlushing, kStopped };
  enum class Kind : uint8_t { kUndecided, kGradients, kLoad };
  enum class Stage : uint8_t { kOpen, kReducing, kStaged };

  // Delays the apply of a shard for a pull.
  struct Pin {
    RequestId request;
    int64_t until_ms;
  };
  struct WaitingPull {
    RequestId request;
    int64_t version;
  };
  struct Shard {
    ShardId id = 0;
    int64_t applied_step = kLoading;
    Digest applied;
    bool applying = false;  // StartApply is under way
    Digest fetching;        // the decision of the FetchShard under way; empty: none
    Stage stage = Stage::kOpen;
    ShardStaged staged;
    std::vector<ExpectedPiece> expected;
    std::vector<StagedPiece> pieces;  // by ascending (rank, region)
    std::vector<Pin> pins;
    std::vector<WaitingPull> pulls;
  };
  // A push that is not answered, because other copies have not confirmed its piece.
  struct PendingPush {
    Forward forward;
    std::vector<RequestId> requests;  // of all workers that have sent the piece
    std::vector<ServerId> waiting;    // copies that have not confirmed it
    int64_t sent_ms = 0;
  };

  // Defined in participant.cc: epochs, decisions, start and stop. Obey handles one message of the
  // leader.
  bool Joined() const { return reported_epoch_ == epoch_; }
  void Obey(ServerId from, const Recover& message, int64_t now_ms, Actions* actions);
  void Obey(ServerId from, const Restore& message, int64_t now_ms, Actions* actions);
  void Obey(ServerId from, const CatchUp& message, int64_t now_ms, Actions* actions);
  void Obey(ServerId from, const OpenJob& message, int64_t now_ms, Actions* actions);
  void Obey(ServerId from, const Flush& message, int64_t now_ms, Actions* actions);
  void Obey(ServerId from, const Absent& message, int64_t now_ms, Actions* actions);
  void Obey(ServerId from, const Seal& message, int64_t now_ms, Actions* actions);
  void Obey(ServerId from, const StageReply& message, int64_t now_ms, Actions* actions);
  void Obey(ServerId from, const Prepare& message, int64_t now_ms, Actions* actions);
  void Obey(ServerId from, const Apply& message, int64_t now_ms, Actions* actions);
  void Obey(ServerId from, const Discard& message, int64_t now_ms, Actions* actions);
  void MaybeReport(Actions* actions);
  RecoverReport BuildReport() const;
  absl::Status CanPrepare(const DecisionRecord& decision) const;
  void ReplyPrepared(absl::Status status, const DecisionRecord& decision, Actions* actions);
  void StartApplies(int64_t now_ms, Actions* actions);
  void ReplyApplied(Actions* actions);
  void ReplyCatchUp(absl::Status status, Actions* actions);
  bool CatchUpDone() const;
  void AdoptCommitted(DecisionPtr decision, Actions* actions);
  void MaybeFlush(Actions* actions);
  void LearnKept(const RecoverReport::Flush& kept, Actions* actions);
  void DropOldFlushes();
  std::vector<int64_t> FlushedSteps() const;
  bool IsNeeded(const RecoverReport::Flush& flush) const;
  WriteFlush NextFlush(bool is_stop);
  void SendToLeader(Message message, Actions* actions) const;

  // Defined in participant_staging.cc: pushes until they are staged, and pulls.
  int LocalIndex(ShardId shard) const;
  bool IsInSync(ShardId shard) const;
  // Whether a placement lists a copy that an earlier life of this server held.
  bool NamesEarlierLife(const Placement& placement) const;
  KeyVerdict CompareKey(const AttemptKey& key) const;
  bool HasRoom() const { return layout_ == nullptr || layout_->digest == taken_layout_; }
  void AnswerOpen(Actions* actions);
  absl::Status CheckOpen(const PushPiece& piece) const;
  absl::Status Unfit(const std::string& text) const;  // FailedPrecondition, see UnfitStep
  absl::Status CheckPiece(const PushPiece& piece, const Shard& shard, bool* stored) const;
  absl::Status CheckFirstLoad() const;
  ShardName NameOf(ShardId shard) const;
  absl::Status CheckServing(const Shard& shard, int64_t version) const;
  void StorePiece(const PushPiece& piece, Shard* shard);
  std::vector<ServerId> OtherCopies(ShardId shard) const;
  void ForwardPiece(RequestId request, const PushPiece& piece, int64_t now_ms, Actions* actions);
  void OnForwardReply(ServerId from, const ForwardReply& reply, Actions* actions);
  bool IsAbsent(Rank rank, TensorId tensor) const;
  bool IsStaged() const;
  void CheckStaged(Shard* shard, Actions* actions);
  void MaybeSendStageReport(Actions* actions);
  void SendStagingFailure(int64_t now_ms, Actions* actions);
  absl::Status AttemptFailure() const;  // why the open attempt cannot be decided; OK if it can
  void DropAttempt(Actions* actions);
  void FailPendingPushes(const absl::Status& status, Actions* actions);
  void FailWaitingPulls(const absl::Status& status, Actions* actions);
  void WakePulls(Shard* shard, int64_t now_ms, Actions* actions);
  void Reply(RequestId request, absl::Status status, Actions* actions) const;

  std::shared_ptr<const JobSpec> spec_;
  ServerId self_;
  ServerId leader_;
  ParticipantOptions options_;
  Life life_ = Life::kRunning;

  int64_t epoch_ = 0;          // the highest one heard of; obeyed once durable
  int64_t durable_epoch_ = 0;  // the highest one synced to disk
  // The durable epoch when this life began. Its leader knows the report of an earlier life, so this
  // life takes part from the next epoch on.
  int64_t start_epoch_ = 0;
  int64_t reported_epoch_ = -1;  // the highest one in which this life has sent its report
  int64_t incarnation_ = 0;
  bool has_lost_memory_ = false;  // this life began without the state of the one before
  bool opened_ = false;           // an OpenJob of this epoch was obeyed
  int64_t register_sent_ms_ = INT64_MIN / 2;

  std::vector<Shard> shards_;
  std::vector<int> local_index_;                        // by ShardId; -1: not here
  std::vector<RecoverReport::Flush> flushes_;           // newest first
  std::vector<RecoverReport::Flush> reported_flushes_;  // of the last report
  // The newest flush that all servers have, as the leader has told; nullopt: it has not yet.
  std::optional<RecoverReport::Flush> kept_;
  int64_t kept_epoch_ = 0;                        // in which it has
  int64_t kept_told_step_ = kLoading;             // committed_step_ then
  std::optional<RecoverReport::Flush> flushing_;  // WriteFlush is under way, of a running job
  // The last flush of this epoch that could not be written; empty: none. The leader ends it, so a
  // repeated Flush must not write it after all: the leader would not know of it.
  Digest failed_flush_;
  absl::Status flush_failure_;
  std::vector<int64_t> needed_;  // WriteFlush::needed of the last one

  // The attempt under way, of step committed_step_ + 1.
  int64_t committed_step_ = kLoading;
  int64_t generation_ = 0;
  int64_t attempt_ = 0;  // 0: nothing has been opened, or it was dropped
  std::shared_ptr<const Layout> layout_;
  Digest taken_layout_;         // the layout that the shell has room for; empty: none
  Digest taking_layout_;        // the layout of the TakeLayout under way; empty: none
  absl::Status layout_status_;  // as OnLayoutTaken was last told
  std::shared_ptr<const Placement> placement_;
  Kind kind_ = Kind::kUndecided;
  bool has_pieces_ = false;
  bool sealed_ = false;
  bool has_scale_ = false;
  double scale_ = 1.0;
  std::vector<ParticipantImage::AbsentTensors> absent_;
  std::vector<PendingPush> pending_pushes_;
  bool stage_report_due_ = false;  // a StageReport was sent and has no StageReply yet
  int64_t stage_report_sent_ms_ = 0;

  absl::Status staging_failure_;  // of the open attempt; sent to the leader until the attempt ends
  int64_t failure_sent_ms_ = 0;

  DecisionPtr prepared_;
  bool prepared_durable_ = false;
  bool committed_ = false;                   // Apply has arrived for prepared_
  std::map<ShardId, absl::Status> damaged_;  // shards that cannot apply prepared_, and why
  DecisionPtr last_applied_;
  int64_t discarded_step_ = kLoading;
  int64_t discarded_attempt_ = 0;
  bool discard_durable_ = true;

  bool catching_up_ = false;  // a CatchUp of this epoch was obeyed
  DecisionPtr catch_up_;      // the decision of that CatchUp; null: the job is LOADING
  absl::Status catch_up_status_;
  std::vector<ServerId> catch_up_sources_;
  bool restoring_ = false;  // LoadFlush is under way
  Restore restore_;         // the message that asked for it
};

}  // namespace orlop::step
