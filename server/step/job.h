// The step machine's model of a job: its fixed specification, its decisions, and the small record
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

// A durability level: the failures that a commit survives (ARCHITECTURE.md, "What survives").
enum class Level : uint8_t { kMemory, kJournaled, kReplicated, kReplicatedJournaled };
inline bool IsJournaled(Level level) {
  return level == Level::kJournaled || level == Level::kReplicatedJournaled;
}
const char* ToString(Level level);

// Everything that is fixed at CreateJob. It is the same on every server: Recover and OpenJob carry
// manifest_digest, and a participant ignores them if its own differs.
struct JobSpec {
  Digest manifest_digest;
  Level level = Level::kMemory;
  uint32_t arithmetic_version = 1;
  int server_count = 1;
  std::vector<TensorSpec> tensors;
  std::vector<ShardSpec> shards;  // in manifest order
};

// Checks that the shards tile each tensor in order, and that each shard has at least one copy, all
// on different and known servers.
//   Status  InvalidArgument, naming the tensor, shard or server that is wrong.
absl::Status ValidateJobSpec(const JobSpec& spec);

enum class DecisionKind : uint8_t { kApply, kSkip, kLoad };
const char* ToString(DecisionKind kind);

// The change by which every shard makes `step` from step - 1. The leader builds it once. Two
// records are the same decision if and only if their identities are equal.
struct DecisionRecord {
  int64_t epoch = 0;  // of the leader that built it; not part of the identity
  int64_t generation = 0;
  int64_t step = 0;  // the step it makes; the first LOAD makes step 0
  int64_t attempt = 0;
  DecisionKind kind = DecisionKind::kApply;
  uint32_t arithmetic_version = 0;
  Digest previous;              // identity of the decision that made step - 1 (empty for step 0)
  Digest staged;                // of the staged digests of all shards, in manifest order
  double scale = 1.0;           // loss scale of all pushes of the attempt
  double sum_of_squares = 0.0;  // of the raw (scaled, summed) gradient, shards in manifest order
  uint64_t non_finite_count = 0;
  std::string scalars;  // opaque, from ScalarBuilder; empty for SKIP and LOAD
  // By tensor, after this decision: the number of APPLYs that have updated it. A LOAD may set it.
  std::vector<int64_t> applied_count;
  std::vector<uint8_t> untouched;  // by tensor: 1 if it is absent from all contributors
  Digest identity;                 // Identify(*this), set by the builder of the record
};
using DecisionPtr = std::shared_ptr<const DecisionRecord>;

// Returns the digest of every field but `epoch` and `identity`, in the order above.
Digest Identify(const DecisionRecord& decision);

// An in-sync copy of a shard: a server in one of its incarnations. Recovery counts its report, it
// serves pulls, and it can become the primary.
struct Copy {
  ServerId server = 0;
  int64_t incarnation = 0;
  friend bool operator==(const Copy&, const Copy&) = default;
};

// The placement map of a job: by ShardId, the in-sync copies of the shard, the primary first.
using Placement = std::vector<std::vector<Copy>>;

// The state that must outlive any leader. orlopd keeps it in the synced data directory of the first
// peer, which is the only leader; the simulator keeps it in a coordination store, and any server
// may lead. Only leaders write it, and never for a single step. A write is a compare-and-swap on
// `version`: if it finds another version, the leader has been replaced.
struct JobRecord {
  int64_t version = 0;
  int64_t epoch = 0;
  bool opened = false;                   // false: no shard has held anything yet
  int64_t generation = 0;                // highest issued
  int64_t formed = 0;                    // the generation that contributes; 0: none yet
  std::shared_ptr<const Layout> layout;  // of `formed`; null: none yet
  Placement in_sync;
  // If rolling_back: a rollback, accepted by an operator, that has not reached every shard yet.
  bool rolling_back = false;
  int64_t rollback_step = 0;
  Digest rollback_digest;
  // A Join whose min_committed_step is at most accepted_loss passes while the job is still at
  // accepted_at: the operator has accepted that loss.
  int64_t accepted_at = -1;
  int64_t accepted_loss = -1;
};

}  // namespace orlop::step
