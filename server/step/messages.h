// The messages between the step machines of different servers: plain structs, one for each kind of
// StepMessage (proto/orlop/v1/peer.proto). The shell sends them with the RPC Peer.Step, the
// simulator in memory.
//
// Every message may be lost, repeated, delayed or overtaken: a machine repeats a message until it
// is answered (OnTick), and every receiver is idempotent. So the shell sends each `Send` once and
// may drop it. An answer repeats the key (step, attempt, decision) of the message that it answers;
// a machine ignores an answer whose key no longer matches. Every message has the epoch of its
// sender. A participant answers a leader's message of a lower epoch with Fenced. A leader ignores
// messages of other epochs than its own, except Register and Fenced.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "server/step/identity.h"
#include "server/step/job.h"
#include "server/step/layout.h"

namespace orlop::step {

// The step of a job that has committed nothing. The first LOAD makes step 0.
inline constexpr int64_t kLoading = -1;

// ---- Participant to leader -------------------------------------------------------------------

// Register message: the participant has started, or started again, and no leader has contacted it
// since. It repeats the message until a Recover of a higher epoch arrives.
struct Register {
  int64_t incarnation = 0;
  int64_t epoch = 0;  // the highest that the participant has synced
};

// The version of one copy of a shard.
struct ShardReport {
  ShardId shard = 0;
  int64_t applied_step = kLoading;
  Digest applied;  // identity of the decision that made applied_step; empty if none
};

// Answers Recover, once the participant has synced the epoch.
struct RecoverReport {
  int64_t epoch = 0;  // echo
  int64_t incarnation = 0;
  std::vector<ShardReport> shards;  // the ones this server has a copy of
  DecisionPtr last_applied;         // null: nothing applied. The newest over its shards
  DecisionPtr prepared;             // null: none
  int64_t generation = 0;           // the newest of which an attempt was opened here; 0: none
  // The attempt of which this server still holds every byte that it has staged, whether or not the
  // attempt is complete. staged_attempt 0: none.
  int64_t staged_step = 0;
  int64_t staged_attempt = 0;
  bool is_staged = false;  // every shard of this server is staged in that attempt: it can prepare
  // The highest attempt of step highest_attempt_step that was opened, prepared or discarded here.
  int64_t highest_attempt = 0;
  int64_t highest_attempt_step = kLoading;
  struct Flush {
    int64_t step = 0;
    Digest decision;  // identity of the decision that made `step`
  };
  // The whole ones on disk, newest first. Each has all shards of the server.
  std::vector<Flush> flushes;
};

// The result of staging one shard.
struct ShardStaged {
  ShardId shard = 0;
  Digest digest;  // of the bytes that the optimizer reads; empty if `absent`
  double sum_of_squares = 0.0;
  uint64_t non_finite_count = 0;
  bool absent = false;                // no contributor had a gradient for the tensor
  int64_t loaded_applied_count = -1;  // LOAD: the tensor's, from SetState; -1: not given
};

// StageReport message: every shard of this server is staged. It is repeated until a StageReply
// arrives.
struct StageReport {
  int64_t epoch = 0;
  int64_t generation = 0;
  int64_t step = 0;
  int64_t attempt = 0;
  bool is_load = false;
  bool has_scale = false;  // false: no gradient was pushed, so every tensor is absent
  double scale = 1.0;      // loss scale of the pushes
  std::vector<ShardStaged> shards;
};

// ---- Leader to participant, and the answers --------------------------------------------------

// Recover message: a new epoch begins. The participant syncs it, refuses every lower epoch from
// then on, and answers with RecoverReport.
struct Recover {
  int64_t epoch = 0;
  Digest manifest_digest;  // another job of the same name ignores the message
};

// Restore message: an operator has accepted a rollback to the state that this decision made. The
// participant loads its flush of that state, unless its shards are in that state already, drops
// everything later, and answers with RestoreReply.
struct Restore {
  int64_t epoch = 0;
  int64_t step = 0;
  Digest decision;
};
struct RestoreReply {
  int64_t epoch = 0;
  int64_t step = 0;
  Digest decision;
  absl::Status status;  // DataLoss: this server has no such flush, or the flush is damaged
};

// CatchUp message: the participant copies its shards, at exactly `decision`'s step, from in-sync
// copies. The leader sends it only while no step is being made, and repeats it as a keep-alive. The
// participant answers every one at once; `done` is false until all shards are copied.
struct CatchUp {
  int64_t epoch = 0;
  DecisionPtr decision;           // the committed one; null while LOADING (nothing to copy)
  std::vector<ServerId> sources;  // by ShardId: a server with the shard; -1: not for this server
};
struct CatchUpReply {
  int64_t epoch = 0;
  Digest decision;
  bool done = false;
  absl::Status status;  // not OK: the copying has failed, and the copy stays out of sync
};

// OpenJob message: opens the attempt (generation, step, attempt) for pushes. The participant drops
// the bytes staged for a lower attempt, and ignores the message if another step or a higher attempt
// is open. It answers with OpenReply once its shell has room to stage the layout.
struct OpenJob {
  int64_t epoch = 0;
  int64_t generation = 0;
  int64_t committed_step = kLoading;  // the attempt makes committed_step + 1
  int64_t attempt = 0;
  Digest manifest_digest;
  std::shared_ptr<const Layout> layout;  // null: no generation has formed, so pushes are refused
  std::shared_ptr<const Placement> placement;
  // The newest flush that all servers have. A server may erase older ones. Empty decision: none.
  RecoverReport::Flush kept;
};
struct OpenReply {
  int64_t epoch = 0;
  int64_t generation = 0;
  int64_t committed_step = 0;
  int64_t attempt = 0;
  // ResourceExhausted: the shell has no room to stage this layout. The leader repeats OpenJob.
  absl::Status status;
};

// Flush message: the participant writes its shards to disk at `step`, which all of them have
// applied, and goes on serving. Meanwhile the leader sends no Apply of a later step. The
// participant answers with FlushReply when the flush is on disk, or cannot be written. In the same
// epoch a failure is final: a repeated message gets the same answer.
struct Flush {
  int64_t epoch = 0;
  int64_t step = 0;
  Digest decision;
  RecoverReport::Flush kept;  // as in OpenJob
};
struct FlushReply {
  int64_t epoch = 0;
  int64_t step = 0;
  Digest decision;
  absl::Status status;
};

// Absent message: contributor `rank` has no gradient for these tensors in this attempt.
struct Absent {
  int64_t epoch = 0;
  int64_t generation = 0;
  int64_t step = 0;
  int64_t attempt = 0;
  Rank rank = 0;
  std::vector<TensorId> tensors;  // ascending, not empty
};
struct AbsentReply {
  int64_t epoch = 0;
  int64_t step = 0;
  int64_t attempt = 0;
  Rank rank = 0;
  // AlreadyExists: the rank has pushed a gradient for one of the tensors. Any other error: the
  // attempt cannot be decided on this server.
  absl::Status status;
};

// Seal message: every contributor has committed this attempt as a LOAD. The participant stages the
// pieces that have arrived, and answers with SealReply.
struct Seal {
  int64_t epoch = 0;
  int64_t generation = 0;
  int64_t step = 0;
  int64_t attempt = 0;
};
// A participant that cannot stage a shard of an attempt, of whatever kind, also sends this without
// a Seal, and repeats it until the attempt ends.
struct SealReply {
  int64_t epoch = 0;
  int64_t step = 0;
  int64_t attempt = 0;
  // FailedPrecondition: gradients were pushed in this attempt, or the first LOAD leaves a shard
  // unset. Any other error: a shard could not be staged. The leader then opens the next attempt.
  absl::Status status;
};

// Answers StageReport, also one that the leader does not use.
struct StageReply {
  int64_t epoch = 0;
  int64_t step = 0;
  int64_t attempt = 0;
  bool is_load = false;  // echo
};

// Prepare message: the participant keeps the staged bytes and the decision record at the job's
// durability level, and answers with Prepared.
struct Prepare {
  int64_t epoch = 0;  // of the sender; the record may be of an older one
  DecisionPtr decision;
};
struct Prepared {
  int64_t epoch = 0;
  int64_t step = 0;
  Digest decision;
  Level level = Level::kMemory;  // the level reached
  absl::Status status;           // not OK: why this server cannot prepare the decision
};

// Apply message: the decision is committed, and the participant applies it to its shards. It
// answers every Apply at once with Applied, in which `done` is false while shards are still being
// applied, and sends one more Applied when the last shard is applied.
struct Apply {
  int64_t epoch = 0;
  int64_t step = 0;
  Digest decision;
};
struct Applied {
  int64_t epoch = 0;
  int64_t step = 0;
  Digest decision;
  bool done = false;
  absl::Status status;  // not OK: a shard of the server is damaged, so `done` stays false
};

// Discard message: no decision of the attempts of `step` up to and including `attempt` has
// committed. The participant drops everything that is prepared or staged for these attempts and
// refuses them for ever. It answers with Discarded once that is synced (journaled levels), else at
// once.
struct Discard {
  int64_t epoch = 0;
  int64_t step = 0;
  int64_t attempt = 0;
};
struct Discarded {
  int64_t epoch = 0;
  int64_t step = 0;
  int64_t attempt = 0;
};

// Fenced message: a leader has sent a message of a lower epoch than the highest that the
// participant has received in a Recover.
struct Fenced {
  int64_t epoch = 0;  // the participant's
};

// ---- Primary to the other copies of a shard --------------------------------------------------

// The key of a pushed piece.
struct PieceKey {
  int64_t generation = 0;
  int64_t step = 0;
  int64_t attempt = 0;
  ShardId shard = 0;
  Rank rank = 0;
  // Gradients: the region id of the contributor's layout. LOADs: a digest of (slot, box), see
  // LoadRegion.
  uint64_t region = 0;
  friend auto operator<=>(const PieceKey&, const PieceKey&) = default;
};

// A pushed piece, all bytes of which have arrived. The shell holds the bytes.
struct PushPiece {
  PieceKey key;
  int64_t epoch = 0;  // of the placement map that the worker used; 0: not given
  bool is_load = false;
  Digest payload;              // XXH3-128 of the piece's bytes in row-major order
  double scale = 1.0;          // loss scale; ignored for LOAD
  int64_t applied_count = -1;  // LOAD of optimizer state: updates it has seen; -1: not given
};

// Forward message: the primary passes an accepted piece, with its bytes, to another in-sync copy.
struct Forward {
  int64_t epoch = 0;
  PushPiece piece;
};
// Answers Forward. OK: the copy holds the piece.
struct ForwardReply {
  int64_t epoch = 0;
  PieceKey key;
  absl::Status status;
};

using Message = std::variant<Register, RecoverReport, StageReport, Recover, Restore, RestoreReply,
                             CatchUp, CatchUpReply, OpenJob, OpenReply, Flush, FlushReply, Absent,
                             AbsentReply, Seal, SealReply, StageReply, Prepare, Prepared, Apply,
                             Applied, Discard, Discarded, Fenced, Forward, ForwardReply>;

// The action, of either machine, of sending `message` to server `to`: to its Leader if ForLeader is
// true of the message, else to its Participant. A machine may send to its own server.
struct Send {
  ServerId to = 0;
  Message message;
};

// Returns whether the message is for the Leader of the receiving server. A new kind of message that
// participants send must be added to its list.
bool ForLeader(const Message& message);

}  // namespace orlop::step
