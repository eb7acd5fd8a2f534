// What the machines ask of their shell. A shell carries actions out in any order and at any speed,
// unless an action says otherwise, and reports completions by the event that each names.
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

using RequestId = uint64_t;  // the shell's name for a worker's or operator's waiting call

// Where a job stands: part of every answer, so that callers branch on fields and never on text.
struct Position {
  int64_t epoch = 0;
  int64_t generation = 0;  // that contributes; 0: none
  int64_t committed_step = kLoading;
  int64_t attempt = 0;  // open attempt of committed_step + 1; 0: none open
};

// The answer to a worker's or operator's request. Each request is answered exactly once by a
// machine that lives on; a crash leaves the caller to its deadline.
struct Answer {
  RequestId request = 0;
  absl::Status status;
  Position position;
  DecisionPtr decision;           // CommitStep: the decision that made the step
  Level level = Level::kMemory;   // CommitStep: the level reached
  int64_t generation_issued = 0;  // Join with generation 0
};

// ---- Participant -----------------------------------------------------------------------------

// Sync `epoch` to disk; nothing lower may be accepted after a restart. Event: OnEpochDurable.
struct PersistEpoch {
  int64_t epoch = 0;
};
// Journaled levels only. Write and sync the decision with the staged bytes it consumes.
// Event: OnDecisionDurable.
struct PersistDecision {
  DecisionPtr decision;
};
// Journaled levels only: sync that (step, attempt and lower) is discarded. Event: OnDiscardDurable.
struct PersistDiscard {
  int64_t step = 0;
  int64_t attempt = 0;
};
// Make room to stage the pieces of `layout`, and drop what is staged of the layout before. It is
// given only while nothing staged is needed. Event: OnLayoutTaken.
struct TakeLayout {
  std::shared_ptr<const Layout> layout;
};
// All pieces of a shard are here (or absent): sum them by ascending rank, hash, take the norm.
// Rank order and pieces: Participant::PiecesOf. Event: OnShardStaged.
struct StageShard {
  ShardId shard = 0;
  int64_t step = 0;
  int64_t attempt = 0;
  bool is_load = false;
};
// Free what is staged for (step, attempt) on this server: it will never be used. In the order given
// among pushes and StageShard. Bytes that wait for a StartApply are of another step. No event.
struct DropStaged {
  int64_t step = 0;
  int64_t attempt = 0;
};
// Make version decision->step of the shard from version step - 1 and what is staged, as one unit,
// and free what was staged. SKIP (or an untouched tensor) changes only the version. Event:
// OnShardApplied.
struct StartApply {
  ShardId shard = 0;
  DecisionPtr decision;
};
// Pass an accepted piece's bytes on with this message (its Send is not given separately).
struct ForwardBytes {
  ServerId to = 0;
  Forward forward;
};
// Send the shard's bytes of exactly `version` to the waiting pull; then PullDone.
struct Serve {
  RequestId request = 0;
  ShardId shard = 0;
  int64_t version = 0;
};
// Copy the shard at `decision`'s step from `source`, replacing what is here (durably, at a
// journaled level) and any FetchShard of it still running. Event: OnShardFetched.
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
// Clean stop: write all state with Participant::Image(), sync, keep the two newest flushes.
// Event: OnFlushed.
struct WriteFlush {};

// ---- Leader ----------------------------------------------------------------------------------

// Replace the job's record if its version is still record.version - 1; sync. Event:
// OnRecordPersisted.
struct PersistRecord {
  JobRecord record;
};

using Action = std::variant<Send, Answer, PersistEpoch, PersistDecision, PersistDiscard, TakeLayout,
                            StageShard, DropStaged, StartApply, ForwardBytes, Serve, FetchShard,
                            LoadFlush, WriteFlush, PersistRecord>;
using Actions = std::vector<Action>;

}  // namespace orlop::step
