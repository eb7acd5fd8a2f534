// What step machines of different servers say to each other: plain structs, one for each kind of
// StepMessage (proto/orlop/v1/peer.proto). The shell carries them with the RPC Peer.Step, the
// simulator in memory.
//
// Every message may be lost, repeated, delayed or overtaken: machines send again until answered
// (OnTick) and every receiver is idempotent. So the shell sends each `Send` once, hands over
// whatever answer comes, and may drop anything. Answers echo the key of what they answer; an answer
// that no longer matches is ignored. Every message carries the epoch; a lower one is refused with
// Fenced.
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

// The first step's predecessor: a job that holds nothing yet.
inline constexpr int64_t kLoading = -1;

// ---- Participant to leader -------------------------------------------------------------------

// Register message: "I have (re)started and know no leader." Sent until a Recover or OpenJob
// arrives.
struct Register {
  int64_t incarnation = 0;
  int64_t epoch = 0;  // highest the participant has synced
};

// What one copy of a shard holds.
struct ShardReport {
  ShardId shard = 0;
  int64_t applied_step = kLoading;
  Digest applied;  // identity of the decision that made applied_step; empty if none
};

// Answer to Recover, sent only after the epoch is synced.
struct RecoverReport {
  int64_t epoch = 0;  // echo
  int64_t incarnation = 0;
  std::vector<ShardReport> shards;  // the ones this server has a copy of
  DecisionPtr last_applied;         // null: nothing applied. The newest over its shards
  DecisionPtr prepared;             // null: none
  // The attempt whose staged bytes (complete or not) are all still here; staged_attempt 0: none.
  int64_t generation = 0;
  int64_t staged_step = 0;
  int64_t staged_attempt = 0;
  bool is_staged = false;       // all of this server's shards are staged in it: it can prepare
  int64_t highest_attempt = 0;  // ever opened or discarded of step highest_attempt_step
  int64_t highest_attempt_step = kLoading;
  struct Flush {
    int64_t step = 0;
    Digest decision;  // identity of the decision that made it
  };
  std::vector<Flush> flushes;  // whole flushes on disk, each of all shards of this server
};

// What staging a shard found.
struct ShardStaged {
  ShardId shard = 0;
  Digest digest;  // of the bytes the optimizer consumes; empty if absent from all
  double sum_of_squares = 0.0;
  uint64_t non_finite_count = 0;
  bool absent = false;                // no contributor had a gradient for the tensor
  int64_t loaded_applied_count = -1;  // LOAD: what SetState gave for the tensor; -1: not given
};

// StageReport message: every shard of this server is staged. Sent until StageReply.
struct StageReport {
  int64_t epoch = 0;
  int64_t generation = 0;
  int64_t step = 0;
  int64_t attempt = 0;
  bool is_load = false;
  bool has_scale = false;  // false: no push arrived (every tensor absent)
  double scale = 1.0;
  std::vector<ShardStaged> shards;
};

// ---- Leader to participant, and the answers --------------------------------------------------

// Recover message: "epoch `epoch` begins; sync it, then report." Stops all older ones.
struct Recover {
  int64_t epoch = 0;
  Digest manifest_digest;
};

// Restore message, of an accepted rollback: load the flush (or keep the state) that this decision
// made; drop everything later. Answered by RestoreReply.
struct Restore {
  int64_t epoch = 0;
  int64_t step = 0;
  Digest decision;
};
struct RestoreReply {
  int64_t epoch = 0;
  int64_t step = 0;
  Digest decision;
  absl::Status status;  // DataLoss: this server has no such flush, or it is damaged
};

// CatchUp message: copy the shards at exactly `decision`'s step from in-sync copies. Sent only
// while no step is under way. Repeated as a keep-alive: answered at once, `done` false while it
// runs.
struct CatchUp {
  int64_t epoch = 0;
  DecisionPtr decision;           // the committed one; null while LOADING (nothing to copy)
  std::vector<ServerId> sources;  // per shard of the manifest: who has it; -1: not for this server
};
struct CatchUpReply {
  int64_t epoch = 0;
  Digest decision;
  bool done = false;
  absl::Status status;  // not OK: gave up; the copy stays out of sync
};

// OpenJob message: opens (generation, step, attempt) for pushes. Drops what is staged for lower
// ones. An overtaken one is ignored. Answered by OpenReply, once the server has room for the
// layout.
struct OpenJob {
  int64_t epoch = 0;
  int64_t generation = 0;
  int64_t committed_step = kLoading;  // step + 1 is being made
  int64_t attempt = 0;
  Digest manifest_digest;
  std::shared_ptr<const Layout> layout;  // null: no generation has formed yet, no push is accepted
  std::shared_ptr<const Placement> placement;
};
struct OpenReply {
  int64_t epoch = 0;
  int64_t generation = 0;
  int64_t committed_step = 0;
  int64_t attempt = 0;
  absl::Status
      status;  // ResourceExhausted, from the shell: no room to stage this layout; asked again
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
  absl::Status status;  // AlreadyExists: the rank has pushed a gradient for one of them
};

// Seal message: every contributor has committed this attempt as a LOAD: stage what has arrived.
struct Seal {
  int64_t epoch = 0;
  int64_t generation = 0;
  int64_t step = 0;
  int64_t attempt = 0;
};
// Also sent unasked, until the attempt ends, by a server that cannot stage a shard of it.
struct SealReply {
  int64_t epoch = 0;
  int64_t step = 0;
  int64_t attempt = 0;
  // FailedPrecondition: gradients were pushed in this attempt, or the first LOAD leaves a shard
  // unset. Any other error: a shard could not be staged. The leader opens the next attempt.
  absl::Status status;
};

struct StageReply {
  int64_t epoch = 0;
  int64_t step = 0;
  int64_t attempt = 0;
  bool is_load = false;  // echo
};

// Prepare message: keep gradient and record at the job's level.
struct Prepare {
  int64_t epoch = 0;  // of the sender; the record may be of an older one
  DecisionPtr decision;
};
struct Prepared {
  int64_t epoch = 0;
  int64_t step = 0;
  Digest decision;
  Level level = Level::kMemory;  // reached
  absl::Status status;           // not OK: cannot prepare this (names shard and reason)
};

// Apply message: the decision is committed. Answered when every shard of the server has applied it;
// a repeated one is answered at once, `done` false while shards are still being applied.
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
  absl::Status status;  // not OK: a shard of the server is damaged, it will never be done
};

// Discard message: no decision other than the committed one survives: drop whatever is prepared or
// staged for `step` up to and including `attempt`, and refuse it for ever. Answered once journaled.
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

// Participant's answer to a leader whose epoch is lower than one it has synced (or is syncing).
struct Fenced {
  int64_t epoch = 0;  // the receiver's
};

// ---- Primary to the other copies of a shard --------------------------------------------------

// What identifies a pushed piece.
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

// A piece of a box that has arrived whole. The bytes are the shell's and travel with it.
struct PushPiece {
  PieceKey key;
  int64_t epoch = 0;  // the worker's placement; 0: not said
  bool is_load = false;
  Digest payload;              // XXH3-128 of the piece's bytes in row-major order
  double scale = 1.0;          // loss scale; ignored for LOAD
  int64_t applied_count = -1;  // LOAD of optimizer state: what it counts; -1: not given
};

// Forward message: the primary passes an accepted piece, with its bytes, to another in-sync copy.
struct Forward {
  int64_t epoch = 0;
  PushPiece piece;
};
struct ForwardReply {
  int64_t epoch = 0;
  PieceKey key;
  absl::Status status;
};

using Message = std::variant<Register, RecoverReport, StageReport, Recover, Restore, RestoreReply,
                             CatchUp, CatchUpReply, OpenJob, OpenReply, Absent, AbsentReply, Seal,
                             SealReply, StageReply, Prepare, Prepared, Apply, Applied, Discard,
                             Discarded, Fenced, Forward, ForwardReply>;

// Action of either machine: carry `message` to server `to`: to its Leader for what participants
// send (ForLeader), else to its Participant. A machine may send to its own server.
struct Send {
  ServerId to = 0;
  Message message;
};

// True if the message is for the Leader of the receiving server.
bool ForLeader(const Message& message);

}  // namespace orlop::step
