// The part of a training step that every server plays: it holds copies of shards, stages what
// workers push, prepares, applies and discards as the leader says, and serves exact versions.
//
// A pure machine: each event changes the state and appends actions; no socket, disk, clock or
// thread inside. One per (job, server). Not thread-safe: the shell serialises events.
//
// Invariants
//   - nothing of a lower epoch than `epoch()` is obeyed, and no report leaves before its epoch is
//   synced
//   - at most one decision is prepared, of step applied + 1; while it is, nothing new is staged
//   - a shard's applied step and the decision that made it change together, by one step
#pragma once

#include <cstdint>
#include <map>
#include <memory>
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

// The `region` of a LOAD piece's key: tells (slot, box) apart from every other.
uint64_t LoadRegion(std::string_view slot, const Box& box);

// A piece that is staged, in memory or in a flush.
struct StagedPiece {
  PieceKey key;
  Digest payload;
  int64_t applied_count = -1;
};

// Everything a participant must find again after a clean stop; the shell writes it with the state
// bytes. After a crash the shell fills in what is true: see each field.
struct ParticipantImage {
  int64_t epoch = 0;        // highest synced, always
  int64_t incarnation = 0;  // of the process that had this state; 0: none
  bool has_memory = false;  // state as of the end: after a clean stop, or a replayed journal
  std::vector<ShardReport> shards;  // has_memory: what each shard of this server holds
  DecisionPtr last_applied;
  DecisionPtr prepared;               // with its staged bytes
  int64_t discarded_step = kLoading;  // highest discarded, by step, then attempt
  int64_t discarded_attempt = 0;
  // Clean stop only: the open attempt with all of its bytes; attempt 0 otherwise.
  int64_t generation = 0;
  int64_t attempt = 0;
  bool is_load = false;
  bool has_scale = false;
  double scale = 1.0;
  Digest layout;  // that the shell has room for; empty: none
  std::vector<StagedPiece> pieces;
  struct AbsentTensors {
    Rank rank = 0;
    std::vector<TensorId> tensors;
  };
  std::vector<AbsentTensors> absent;
  std::vector<RecoverReport::Flush> flushes;  // whole ones on disk, always
};

// One journal record, as the shell reads them back in the order written.
struct JournalRecord {
  enum class Type : uint8_t { kPrepared, kDiscarded, kApplied } type = Type::kPrepared;
  DecisionPtr decision;  // kPrepared, kApplied (all shards of the server have applied it)
  int64_t step = 0;      // kDiscarded
  int64_t attempt = 0;
};
// What a journal says: which decisions to apply again, in order, on the state at `base_step`, and
// the one that is prepared only. A decision is known to be committed if it was applied or a later
// step was prepared after it.
struct JournalReplay {
  std::vector<DecisionPtr> applied;  // ascending steps from base_step + 1
  DecisionPtr prepared;              // null: none
  int64_t discarded_step = kLoading;
  int64_t discarded_attempt = 0;
};
JournalReplay ReplayJournal(const std::vector<JournalRecord>& journal, int64_t base_step);

// The flush that an image written by a clean stop makes: false if its shards are not all of one
// step.
bool FlushOf(const ParticipantImage& image, RecoverReport::Flush* flush);

// What a push or a query of pushes names, beside the piece.
struct AttemptKey {
  int64_t epoch = 0;       // the worker's; 0: not said
  int64_t generation = 0;  // 0: any
  int64_t step = 0;
  int64_t attempt = 0;  // 0: any
};

// How a key compares with what is open on a server.
struct KeyVerdict {
  // The key is ahead of this server: the leader's word, or the end of an apply, may still come.
  bool is_later = false;
  // OK: the key names the open attempt. If `is_later`, the answer to give when waiting ends.
  absl::Status status;
};

struct ParticipantOptions {
  int64_t resend_ms = 1000;  // repeat an unanswered message
  int64_t pin_ms = 1000;     // longest a running pull delays the apply of its shard
};

class Participant {
 public:
  // `fresh_incarnation` is one never used before (by any server): taken when the image has no
  // memory. The shell must have synced it with the image's epoch before the first event. `leader`:
  // whom to register with until a higher epoch's leader speaks.
  Participant(std::shared_ptr<const JobSpec> spec, ServerId self, ServerId leader,
              const ParticipantImage& image, int64_t fresh_incarnation, ParticipantOptions options);

  // ---- Peers ----
  // Any message that is not ForLeader. `from` is the sender's server.
  void OnMessage(ServerId from, const Message& message, int64_t now_ms, Actions* actions);

  // ---- Workers ----
  // Compares a key with the open attempt, in one place for pushes, SetState and queries of both.
  //   FailedPrecondition  kStaleEpoch; kWrongStep or kLoading: another step; later,
  //                       kStaleGeneration: the generation has not formed
  //   Aborted             kStaleGeneration: an older generation; kStaleAttempt: an older attempt,
  //                       or, later, one that is not open yet
  //   Unavailable         recovering or stopping; later: the step before is still being applied
  //   damage()            a key that is open or later, while a shard of this server is damaged
  //   of OnLayoutTaken    a key that is open, but the shell has no room for the layout; later,
  //                       Unavailable: the shell is making room
  KeyVerdict CheckKey(const AttemptKey& key) const;

  // What a push would be answered now, without its bytes. OK: send them, or, with `*stored`, the
  // same piece is here already. Overlap of LOAD pieces with different boxes is the shell's to
  // refuse.
  //   InvalidArgument     unknown rank or region, a shard of another size, applied_count on a
  //                       gradient
  //   NotFound            this server has no in-sync copy of the shard, or is not its primary
  //   AlreadyExists       same key, other payload; or the rank declared the tensor absent
  //   Aborted             an older attempt or generation than the open one
  //   FailedPrecondition  an older epoch, another step, or the other kind in one attempt
  //   Unavailable         recovering, stopping, applying, or the attempt is not open here yet
  absl::Status CheckPush(const PushPiece& piece, bool* stored) const;

  // A piece has arrived whole. `has_room`: the shell holds memory for it and for the apply;
  // without, the answer is ResourceExhausted and the attempt stays open. Answered OK when every
  // in-sync copy of the shard has it. The shell keeps the bytes if and only if `*keep` is set.
  void OnPush(RequestId request, const PushPiece& piece, bool has_room, int64_t now_ms, bool* keep,
              Actions* actions);
  // The same for a piece that Forward brought from the primary (OnMessage refuses Forward).
  void OnForward(ServerId from, const Forward& forward, bool has_room, int64_t now_ms, bool* keep,
                 Actions* actions);

  // A worker wants exactly `version` of a shard. Serve when it is there; waits while it is the next
  // one; else an Answer: OutOfRange (applied over), Aborted (the attempt it waited for is gone),
  // FailedPrecondition (LOADING, or further ahead), NotFound, Unavailable.
  void OnPull(RequestId request, ShardId shard, int64_t version, int64_t now_ms, Actions* actions);
  void OnPullDone(RequestId request, int64_t now_ms, Actions* actions);       // after Serve
  void OnPullCancelled(RequestId request, int64_t now_ms, Actions* actions);  // deadline; no answer

  // ---- Completions ----
  void OnEpochDurable(int64_t epoch, int64_t now_ms, Actions* actions);
  void OnDecisionDurable(const Digest& decision, int64_t now_ms, Actions* actions);
  // PersistDecision failed: whether the record is on disk is not known. The leader is told why, and
  // only a recovery decides what becomes of the step.
  void OnPrepareFailed(const Digest& decision, absl::Status status, int64_t now_ms,
                       Actions* actions);
  void OnDiscardDurable(int64_t step, int64_t attempt, int64_t now_ms, Actions* actions);
  // The shell has made room for the layout with this digest, or has none: an error is the answer to
  // OpenJob and to pushes, until another OpenJob asks again.
  void OnLayoutTaken(const Digest& layout, absl::Status status, int64_t now_ms, Actions* actions);
  // Ignored if the attempt is no longer the open one. `absent`, `loaded_applied_count`: not read.
  void OnShardStaged(int64_t step, int64_t attempt, const ShardStaged& staged, int64_t now_ms,
                     Actions* actions);
  // StageShard failed: this attempt cannot be decided. The leader is told why until it opens the
  // next one. Ignored if the attempt is no longer the open one.
  void OnShardStagingFailed(ShardId shard, int64_t step, int64_t attempt, absl::Status status,
                            int64_t now_ms, Actions* actions);
  void OnShardApplied(ShardId shard, int64_t step, int64_t now_ms, Actions* actions);
  // StartApply failed for good: the version is committed, but this server can make neither it nor a
  // later one. The shard is lost until a flush or another copy replaces it; others go on. Whoever
  // waits for the shard learns `status`, and so does the leader.
  void OnShardDamaged(ShardId shard, int64_t step, absl::Status status, int64_t now_ms,
                      Actions* actions);
  void OnShardFetched(ShardId shard, const Digest& decision, absl::Status status, int64_t now_ms,
                      Actions* actions);
  // `decision`: what LoadFlush named; `restored`: the flush's last_applied record, if status is OK.
  void OnFlushRestored(const Digest& decision, DecisionPtr restored, absl::Status status,
                       int64_t now_ms, Actions* actions);

  // ---- Life ----
  // Repeats what is unanswered, ends expired pins. Call every resend_ms / 4 or so.
  void OnTick(int64_t now_ms, Actions* actions);
  // Clean stop: refuses everything new, finishes applies, then WriteFlush.
  void OnStop(int64_t now_ms, Actions* actions);
  void OnFlushed(int64_t now_ms, Actions* actions);
  bool stopped() const { return life_ == Life::kStopped; }

  // ---- What can be seen ----
  ParticipantImage Image() const;
  int64_t epoch() const { return epoch_; }
  bool has_reported() const { return Joined(); }  // to this epoch, what this life holds
  int64_t incarnation() const { return incarnation_; }
  Position position() const;
  // NotFound: no copy of this shard here.
  absl::Status AppliedOf(ShardId shard, int64_t* step, Digest* decision) const;
  // Why this server cannot make the committed version of some shard; OK if it can make all. A clean
  // stop never ends while a shard is damaged: no version is whole.
  absl::Status damage() const {
    return damaged_.empty() ? absl::OkStatus() : damaged_.begin()->second;
  }
  DecisionPtr prepared() const { return prepared_; }
  DecisionPtr last_applied() const { return last_applied_; }
  // The staged pieces of a shard by ascending rank, then region; for StageShard and QueryPush.
  std::vector<StagedPiece> PiecesOf(ShardId shard) const;
  // Ranks that declared the shard's tensor absent in the open attempt, ascending.
  std::vector<Rank> AbsentOf(ShardId shard) const;

 private:
  enum class Life : uint8_t { kRunning, kDraining, kFlushing, kStopped };
  enum class Kind : uint8_t { kUndecided, kGradients, kLoad };
  enum class Stage : uint8_t { kOpen, kReducing, kStaged };

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
    bool applying = false;  // StartApply given, not completed
    Digest fetching;        // FetchShard given, not completed; empty: none
    Stage stage = Stage::kOpen;
    ShardStaged staged;
    std::vector<ExpectedPiece> expected;
    std::vector<StagedPiece> pieces;  // by ascending (rank, region)
    std::vector<Pin> pins;
    std::vector<WaitingPull> pulls;
  };
  // A push whose piece other copies do not hold yet.
  struct PendingPush {
    Forward forward;
    std::vector<RequestId> requests;
    std::vector<ServerId> waiting;
    int64_t sent_ms = 0;
  };

  // participant.cc: epochs, decisions, life.
  bool Joined() const { return reported_epoch_ == epoch_; }
  void Obey(ServerId from, const Recover& message, int64_t now_ms, Actions* actions);
  void Obey(ServerId from, const Restore& message, int64_t now_ms, Actions* actions);
  void Obey(ServerId from, const CatchUp& message, int64_t now_ms, Actions* actions);
  void Obey(ServerId from, const OpenJob& message, int64_t now_ms, Actions* actions);
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
  void SendToLeader(Message message, Actions* actions) const;

  // participant_staging.cc: what workers push and pull, until it is staged.
  int LocalIndex(ShardId shard) const;
  bool IsInSync(ShardId shard) const;
  KeyVerdict CompareKey(const AttemptKey& key) const;
  bool HasRoom() const { return layout_ == nullptr || layout_->digest == taken_layout_; }
  void AnswerOpen(Actions* actions);
  absl::Status CheckOpen(const PushPiece& piece) const;
  absl::Status Unfit(const std::string& text) const;  // FailedPrecondition, by the step being made
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
  void FailPendingPushes(absl::Status status, Actions* actions);
  void FailWaitingPulls(absl::Status status, Actions* actions);
  void WakePulls(Shard* shard, int64_t now_ms, Actions* actions);
  void Reply(RequestId request, absl::Status status, Actions* actions) const;

  std::shared_ptr<const JobSpec> spec_;
  ServerId self_;
  ServerId leader_;
  ParticipantOptions options_;
  Life life_ = Life::kRunning;

  int64_t epoch_ = 0;  // highest heard; obeyed once durable
  int64_t durable_epoch_ = 0;
  int64_t start_epoch_ = 0;  // durable when this life began: that epoch's leader knows another life
  int64_t reported_epoch_ = -1;  // highest this life has reported in
  int64_t incarnation_ = 0;
  bool has_lost_memory_ = false;
  bool opened_ = false;  // pushes and pulls are taken
  int64_t register_sent_ms_ = INT64_MIN / 2;

  std::vector<Shard> shards_;
  std::vector<int> local_index_;  // by ShardId; -1: not here
  std::vector<RecoverReport::Flush> flushes_;

  // The step under way: committed_step_ + 1.
  int64_t committed_step_ = kLoading;
  int64_t generation_ = 0;
  int64_t attempt_ = 0;  // 0: nothing has been opened, or it was dropped
  std::shared_ptr<const Layout> layout_;
  Digest taken_layout_;         // that the shell has room for; empty: none
  Digest taking_layout_;        // TakeLayout given, not completed; empty: none
  absl::Status layout_status_;  // of the last completion
  std::shared_ptr<const Placement> placement_;
  Kind kind_ = Kind::kUndecided;
  bool has_pieces_ = false;
  bool sealed_ = false;
  bool has_scale_ = false;
  double scale_ = 1.0;
  std::vector<ParticipantImage::AbsentTensors> absent_;
  std::vector<PendingPush> pending_pushes_;
  bool stage_report_due_ = false;  // complete, not yet acknowledged
  int64_t stage_report_sent_ms_ = 0;

  absl::Status staging_failure_;  // of the open attempt, told until it ends
  int64_t failure_sent_ms_ = 0;

  DecisionPtr prepared_;
  bool prepared_durable_ = false;
  bool committed_ = false;                   // Apply has come for prepared_
  std::map<ShardId, absl::Status> damaged_;  // cannot apply prepared_
  DecisionPtr last_applied_;
  int64_t discarded_step_ = kLoading;
  int64_t discarded_attempt_ = 0;
  bool discard_durable_ = true;

  bool catching_up_ = false;
  DecisionPtr catch_up_;  // null while catching_up_: LOADING
  absl::Status catch_up_status_;
  std::vector<ServerId> catch_up_sources_;
  bool restoring_ = false;
  Restore restore_;
};

}  // namespace orlop::step
