// The rules of recovery, as pure functions: which step is committed when a new epoch begins, and
// which copies can continue from it. leader_recovery.cc acts on the result.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "server/step/job.h"
#include "server/step/messages.h"

namespace orlop::step {

// By ServerId: the report of the server; nullopt if it has not reported in this epoch.
using Reports = std::vector<std::optional<RecoverReport>>;

struct Verdict {
  enum class Outcome : uint8_t {
    kFound,    // step, decision and in_sync are set
    kNoVoter,  // `reason` names a shard without an in-sync copy among the reports
    kDamaged,  // no history explains the states of the in-sync copies: `reason` names a shard
  };
  Outcome outcome = Outcome::kNoVoter;
  std::string reason;
  int64_t step = kLoading;
  DecisionPtr decision;  // the one that made `step`; null: LOADING
  Placement in_sync;     // the copies that have applied or prepared it, or can prepare it
};

// Finds the committed step. Step s + 1 is committed if there is one decision that, for every shard,
// some in-sync copy has applied or holds prepared; otherwise step s is. Decisions are compared by
// identity, never by step or attempt. `in_sync` is the job record's; a report counts only if its
// incarnation is the copy's.
Verdict Resolve(const JobSpec& spec, const Placement& in_sync, const Reports& reports);

// Returns whether it is certain that no LOAD has committed, whatever the lost copies have held.
// Every server must have reported, without an applied decision or a flush. In addition one of these
// must be true:
//   - No generation has ever formed, so no contributor could commit.
//   - An in-sync copy has prepared nothing. Every in-sync copy prepares a LOAD before the LOAD
//     commits, and a copy receives the committed state before it becomes in sync.
bool IsStillLoading(const JobRecord& record, const Reports& reports);

// Returns the states to which an operator may roll back, newest first. For every shard of such a
// state, some server that may hold the shard can restore it (CanRestore).
std::vector<RecoverReport::Flush> RollbackOffers(const JobSpec& spec, const Reports& reports);

// Returns whether the flush of the decision that `target` names is among `flushes`.
bool HasFlush(const std::vector<RecoverReport::Flush>& flushes, const RecoverReport::Flush& target);

// Returns the newest flush that every shard has on the disk of some server that may hold it, of
// `committed_step` at most: a later one is of another history. Empty decision: there is none.
RecoverReport::Flush NewestCommonFlush(const JobSpec& spec, const Reports& reports,
                                       int64_t committed_step);

// Returns whether the server can return to `target`: it has a flush of it, or all of its shards are
// in that state now.
bool CanRestore(const RecoverReport& report, const RecoverReport::Flush& target);

}  // namespace orlop::step
