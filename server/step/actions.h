// The actions that the machines request of their shell. The shell performs actions in any order and
// at any speed, unless a comment here says otherwise. It reports the completion of an action by the
// event named here, a method of Participant or Leader.
#pragma once

#include <cstdint>
#include <memory>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/messages.h"

namespace orlop::step {

using RequestId = uint64_t;  // the shell's number of a waiting call of a worker or operator

// The epoch, generation, step and attempt of a job. Every answer has it, so that callers branch on
// fields and never on text.
struct Position {
  int64_t epoch = 0;
  int64_t generation = 0;  // the one that contributes; 0: none
  int64_t committed_step = kLoading;
  int64_t attempt = 0;  // open attempt of committed_step + 1; 0: none open
};

// The answer to a worker's or operator's request. A machine answers each request exactly once. A
// pull whose version is there gets Serve instead. If the server crashes first, the call ends at its
// deadline.
struct Answer {
  RequestId request = 0;
  absl::Status status;
  Position position;
  DecisionPtr decision;           // CommitStep: the decision that made the step
  Level level = Level::kMemory;   // CommitStep: the level reached
  int64_t generation_issued = 0;  // Join with generation 0: the new generation
};

// ---- Participant -----------------------------------------------------------------------------

// Sync `epoch` to disk; nothing lower may be accepted after a restart. Event: OnEpochDurable.
struct PersistEpoch {
  int64_t epoch = 0;
};
// Journaled levels only. Write and sync the decision with the staged bytes it consumes.
// Event: OnDecisionDurable, or OnPrepareFailed.
struct PersistDecision {
  DecisionPtr decision;
};
// Journaled levels only. Sync that the attempts of `step` up to and including `attempt` are
// discarded. Event: OnDiscardDurable.
struct PersistDiscard {
  int64_t step = 0;
  int64_t attempt = 0;
};
// Reserve memory to stage the pieces of `layout`, and drop all bytes staged under the layout
// before. A machine requests this only while it needs no staged bytes. Event: OnLayoutTaken.
struct TakeLayout {
  std::shared_ptr<const Layout> layout;
};
// Stage a shard of which every piece has arrived or is absent: sum the pieces by ascending rank
// (Participant::PiecesOf has them in this order), and compute the digest and the sum of squares.
// For a LOAD, make the new contents of its slots. Event: OnShardStaged, or OnShardStagingFailed.
struct StageShard {
  ShardId shard = 0;
  int64_t step = 0;
  int64_t attempt = 0;
  bool is_load = false;
};
// Free the bytes staged for (step, attempt) on this server, which will never be used. The shell
// keeps the order of this action among pushes and StageShard. Bytes that a StartApply has yet to
// read belong to another step, and stay. No event.
struct DropStaged {
  int64_t step = 0;
  int64_t attempt = 0;
};
// Make version decision->step of the shard from version step - 1 and the staged bytes, as one unit,
// and free the staged bytes. A SKIP changes only the version, and so does an APPLY of an untouched
// tensor. Event: OnShardApplied, or OnShardDamaged.
struct StartApply {
  ShardId shard = 0;
  DecisionPtr decision;
};
// Send this Forward message to server `to` with the bytes of its piece. No separate Send is
// requested.
struct ForwardBytes {
  ServerId to = 0;
  Forward forward;
};
// Send the shard's bytes of exactly `version` to the waiting pull. Event: OnPullDone.
struct Serve {
  RequestId request = 0;
  ShardId shard = 0;
  int64_t version = 0;
};
// Copy the shard at `decision`'s step from server `source` in place of its contents here, durably
// at a journaled level. A FetchShard of the shard that is still running ends. Event:
// OnShardFetched.
struct FetchShard {
  ShardId shard = 0;
  ServerId source = 0;
  DecisionPtr decision;
};
// Load the flush that `decision` made into memory, for all shards. Event: OnFlushRestored.
struct LoadFlush {
  int64_t step = 0;
  Digest decision;
};
// Write all state and Participant::Image() to disk, and sync. Of a clean stop, with what is staged;
// otherwise without, while pieces arrive. Then erase all flushes but this one and those of the
// steps `keep`; that this fails is no error. If the disk is short of room, erase all but those of
// the steps `needed` before. Event: OnFlushed.
struct WriteFlush {
  bool is_stop = false;
  std::vector<int64_t> keep;
  std::vector<int64_t> needed;
};
// Erase all flushes but those of the steps `keep`. No event: a flush that stays is no error.
struct KeepFlushes {
  std::vector<int64_t> keep;
};

// ---- Leader ----------------------------------------------------------------------------------

// Replace the job's record if its version is still record.version - 1; sync. Event:
// OnRecordPersisted.
struct PersistRecord {
  JobRecord record;
};

using Action = std::variant<Send, Answer, PersistEpoch, PersistDecision, PersistDiscard, TakeLayout,
                            StageShard, DropStaged, StartApply, ForwardBytes, Serve, FetchShard,
                            LoadFlush, WriteFlush, KeepFlushes, PersistRecord>;
using Actions = std::vector<Action>;

}  // namespace orlop::step
