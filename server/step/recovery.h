// What a new epoch finds: the pure rule of recovery, apart from the messages that carry it out.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "server/step/job.h"
#include "server/step/messages.h"

namespace orlop::step {

// By server; nullopt: has not reported in this epoch.
using Reports = std::vector<std::optional<RecoverReport>>;

struct Verdict {
  enum class Outcome : uint8_t {
    kFound,    // step, decision and in_sync hold
    kNoVoter,  // `reason` names a shard without an in-sync copy among the reports
    kDamaged,  // in-sync copies hold states that no history explains: `reason` names them
  };
  Outcome outcome = Outcome::kNoVoter;
  std::string reason;
  int64_t step = kLoading;
  DecisionPtr decision;  // that made `step`; null: LOADING
  Placement in_sync;     // the copies that have it applied, hold it prepared, or can prepare it
};

// Step s + 1 is committed if, for every shard, some in-sync copy has applied it or holds it
// prepared under one common decision; otherwise s. Identities are compared, never step or attempt
// numbers.
Verdict Resolve(const JobSpec& spec, const Placement& in_sync, const Reports& reports);

// True if the first LOAD cannot have been committed, whatever the copies that are lost have held:
// no generation has ever formed, or an in-sync copy holds nothing, although each must prepare a
// LOAD before it commits and is given what has committed before it joins.
bool IsStillLoading(const JobRecord& record, const Reports& reports);

// The flushes (and live states of in-sync copies) that some server holds for every shard, newest
// first: what an operator may roll back to.
std::vector<RecoverReport::Flush> RollbackOffers(const JobSpec& spec, const Placement& in_sync,
                                                 const Reports& reports);

// True if the server can be brought back to `target`: a flush of it, or all its shards in that
// state.
bool CanRestore(const RecoverReport& report, const RecoverReport::Flush& target);

}  // namespace orlop::step
