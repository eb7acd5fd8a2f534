// What a job is to the step machine: its fixed specification, its decisions, and the small record
// that must outlive any leader.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "server/step/identity.h"
#include "server/step/layout.h"

namespace orlop::step {

using ServerId = int32_t;  // index in the sorted list of peers; 0 is the first by name

// What a commit survives (ARCHITECTURE.md, durability levels).
enum class Level : uint8_t { kMemory, kJournaled, kReplicated, kReplicatedJournaled };
inline bool IsJournaled(Level level) {
  return level == Level::kJournaled || level == Level::kReplicatedJournaled;
}
const char* ToString(Level level);

// Fixed at CreateJob, the same on every server (manifest_digest says so).
struct JobSpec {
  Digest manifest_digest;
  Level level = Level::kMemory;
  uint32_t arithmetic_version = 1;
  int server_count = 1;
  std::vector<TensorSpec> tensors;
  std::vector<ShardSpec> shards;  // in manifest order
};

// InvalidArgument naming the tensor, shard or server that is wrong: shards that do not tile their
// tensors in order, no copy, a copy twice, an unknown server.
absl::Status ValidateJobSpec(const JobSpec& spec);

enum class DecisionKind : uint8_t { kApply, kSkip, kLoad };
const char* ToString(DecisionKind kind);

// What every shard does to make step `step` of step - 1. Built once by the leader; two records are
// the same decision if and only if their identities are equal.
struct DecisionRecord {
  int64_t epoch = 0;  // fence of the leader that built it; not part of the identity
  int64_t generation = 0;
  int64_t step = 0;  // the step it makes; the first LOAD makes step 0
  int64_t attempt = 0;
  DecisionKind kind = DecisionKind::kApply;
  uint32_t arithmetic_version = 0;
  Digest previous;              // identity of the decision that made step - 1 (empty for step 0)
  Digest staged;                // of the staged digests of all shards, in manifest order
  double scale = 1.0;           // loss scale all pushes of the attempt carried
  double sum_of_squares = 0.0;  // raw, over all shards in manifest order
  uint64_t non_finite_count = 0;
  std::string scalars;  // opaque, from ScalarBuilder; empty for SKIP and LOAD
  // Per tensor, after this decision: how many APPLYs have touched it since it was loaded.
  std::vector<int64_t> applied_count;
  std::vector<uint8_t> untouched;  // per tensor: 1 if absent from all contributors, its bits stay
  Digest identity;                 // Identify(*this), set by the builder of the record
};
using DecisionPtr = std::shared_ptr<const DecisionRecord>;

// The digest of every field but `epoch` and `identity`, in the order above.
Digest Identify(const DecisionRecord& decision);

// One copy of a shard that votes, serves and can be promoted: a server in one of its incarnations.
struct Copy {
  ServerId server = 0;
  int64_t incarnation = 0;
  friend bool operator==(const Copy&, const Copy&) = default;
};

// shard -> its in-sync copies, primary first. The placement map of a job.
using Placement = std::vector<std::vector<Copy>>;

// What must outlive any leader: in a cluster it lives in the coordination store, without one in a
// synced file of the first peer. Written only by leaders, never per step, by compare-and-swap on
// `version`: a leader whose write finds another version has been replaced.
struct JobRecord {
  int64_t version = 0;
  int64_t epoch = 0;
  bool opened = false;                   // false: no shard has held anything yet
  int64_t generation = 0;                // highest issued
  int64_t formed = 0;                    // the generation that contributes; 0: none yet
  std::shared_ptr<const Layout> layout;  // of `formed`; null: none yet
  Placement in_sync;
  // An accepted rollback that has not reached every shard yet (rolling_back), by identity.
  bool rolling_back = false;
  int64_t rollback_step = 0;
  Digest rollback_digest;
  // A Join whose min_committed_step is at most accepted_loss passes while the job is still at
  // accepted_at: the operator has accepted that loss.
  int64_t accepted_at = -1;
  int64_t accepted_loss = -1;
};

}  // namespace orlop::step
