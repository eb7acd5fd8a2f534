#include "server/step/recovery.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/step/identity.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/messages.h"

namespace orlop::step {
namespace {

const ShardReport* FindShard(const RecoverReport& report, ShardId shard) {
  for (const ShardReport& entry : report.shards) {
    if (entry.shard == shard) return &entry;
  }
  return nullptr;
}

// Returns the report of the copy's server if it is of the copy's incarnation, else null.
const RecoverReport* ReportOf(const Copy& copy, const Reports& reports) {
  const auto& report = reports[copy.server];
  return report.has_value() && report->incarnation == copy.incarnation ? &*report : nullptr;
}

bool HasApplied(const RecoverReport& report, ShardId shard, const Digest& decision) {
  const ShardReport* entry = FindShard(report, shard);
  return entry != nullptr && entry->applied == decision;
}

bool HasPrepared(const RecoverReport& report, const Digest& decision) {
  return report.prepared != nullptr && report.prepared->identity == decision;
}

// Returns whether the server has staged the decision's attempt, and its copy of the shard is in the
// state that the decision follows.
bool CanPrepare(const RecoverReport& report, ShardId shard, const DecisionRecord& decision) {
  return report.is_staged && report.generation == decision.generation &&
         report.staged_step == decision.step && report.staged_attempt == decision.attempt &&
         HasApplied(report, shard, decision.previous);
}

bool IsHeldByAll(const DecisionRecord& decision, const Placement& in_sync, const Reports& reports) {
  for (size_t shard = 0; shard < in_sync.size(); ++shard) {
    const bool held = std::any_of(in_sync[shard].begin(), in_sync[shard].end(), [&](Copy copy) {
      const RecoverReport* report = ReportOf(copy, reports);
      return report != nullptr &&
             (HasApplied(*report, static_cast<ShardId>(shard), decision.identity) ||
              HasPrepared(*report, decision.identity));
    });
    if (!held) return false;
  }
  return true;
}

// Returns every decision that some in-sync copy has applied or prepared, newest first.
std::vector<DecisionPtr> Candidates(const Placement& in_sync, const Reports& reports) {
  std::vector<DecisionPtr> found;
  const auto add = [&](const DecisionPtr& decision) {
    if (decision == nullptr) return;
    for (const DecisionPtr& known : found) {
      if (known->identity == decision->identity) return;
    }
    found.push_back(decision);
  };
  for (const std::vector<Copy>& copies : in_sync) {
    for (const Copy& copy : copies) {
      const RecoverReport* report = ReportOf(copy, reports);
      if (report == nullptr) continue;
      add(report->last_applied);
      add(report->prepared);
    }
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const DecisionPtr& a, const DecisionPtr& b) { return a->step > b->step; });
  return found;
}

// Sets verdict->in_sync to the copies that have verdict->decision or can prepare it. If a shard has
// none, or a copy has applied a later step, sets outcome kDamaged and the reason.
void KeepCopies(const Placement& in_sync, const Reports& reports, Verdict* verdict) {
  const Digest identity = verdict->decision == nullptr ? Digest{} : verdict->decision->identity;
  verdict->in_sync.resize(in_sync.size());
  for (size_t index = 0; index < in_sync.size(); ++index) {
    const ShardId shard = static_cast<ShardId>(index);
    for (const Copy& copy : in_sync[index]) {
      const RecoverReport* report = ReportOf(copy, reports);
      if (report == nullptr) continue;
      const ShardReport* entry = FindShard(*report, shard);
      if (entry != nullptr && entry->applied_step > verdict->step) {
        verdict->outcome = Verdict::Outcome::kDamaged;
        verdict->reason =
            absl::StrCat("shard ", shard, ": server ", copy.server, " has applied step ",
                         entry->applied_step, ", which other shards have lost");
        return;
      }
      const bool follows =
          verdict->decision != nullptr && HasApplied(*report, shard, verdict->decision->previous) &&
          (HasPrepared(*report, identity) || CanPrepare(*report, shard, *verdict->decision));
      if (follows || HasApplied(*report, shard, identity)) verdict->in_sync[index].push_back(copy);
    }
    if (verdict->in_sync[index].empty()) {
      verdict->outcome = Verdict::Outcome::kDamaged;
      verdict->reason = absl::StrCat("shard ", shard, ": no in-sync copy holds step ",
                                     verdict->step, " of the job's history");
      return;
    }
  }
}

}  // namespace

Verdict Resolve(const JobSpec& spec, const Placement& in_sync, const Reports& reports) {
  Verdict verdict;
  for (size_t shard = 0; shard < in_sync.size(); ++shard) {
    const bool has_voter =
        std::any_of(in_sync[shard].begin(), in_sync[shard].end(),
                    [&](Copy copy) { return ReportOf(copy, reports) != nullptr; });
    if (has_voter) continue;
    verdict.reason =
        absl::StrCat("shard ", shard, " of tensor ", spec.tensors[spec.shards[shard].tensor].name,
                     ": no in-sync copy has reported");
    return verdict;
  }
  verdict.outcome = Verdict::Outcome::kFound;
  for (const DecisionPtr& decision : Candidates(in_sync, reports)) {
    if (!IsHeldByAll(*decision, in_sync, reports)) continue;
    verdict.step = decision->step;
    verdict.decision = decision;
    break;
  }
  KeepCopies(in_sync, reports, &verdict);
  return verdict;
}

bool IsStillLoading(const JobRecord& record, const Reports& reports) {
  for (const auto& report : reports) {
    if (!report.has_value()) return false;
    if (report->last_applied != nullptr || !report->flushes.empty()) return false;
  }
  if (record.formed == 0) return true;
  for (const std::vector<Copy>& copies : record.in_sync) {
    for (const Copy& copy : copies) {
      const RecoverReport* report = ReportOf(copy, reports);
      if (report != nullptr && report->prepared == nullptr) return true;
    }
  }
  return false;
}

namespace {

// Returns whether for every shard, some server that may hold it has reported, and `can` is true of
// its report.
template <typename Can>
bool EveryShard(const JobSpec& spec, const Reports& reports, const Can& can) {
  return std::all_of(spec.shards.begin(), spec.shards.end(), [&](const ShardSpec& shard) {
    return std::any_of(shard.copies.begin(), shard.copies.end(), [&](ServerId server) {
      return reports[server].has_value() && can(*reports[server]);
    });
  });
}

}  // namespace

bool HasFlush(const std::vector<RecoverReport::Flush>& flushes,
              const RecoverReport::Flush& target) {
  return std::any_of(flushes.begin(), flushes.end(),
                     [&](const auto& flush) { return flush.decision == target.decision; });
}

bool CanRestore(const RecoverReport& report, const RecoverReport::Flush& target) {
  const bool live = !report.shards.empty() && report.last_applied != nullptr &&
                    report.last_applied->identity == target.decision &&
                    std::all_of(report.shards.begin(), report.shards.end(), [&](const auto& shard) {
                      return shard.applied == target.decision;
                    });
  return live || HasFlush(report.flushes, target);
}

RecoverReport::Flush NewestCommonFlush(const JobSpec& spec, const Reports& reports,
                                       int64_t committed_step) {
  RecoverReport::Flush newest;
  for (const auto& report : reports) {
    if (!report.has_value()) continue;
    for (const auto& flush : report->flushes) {
      if (flush.step > committed_step) continue;
      if (!newest.decision.empty() && flush.step <= newest.step) continue;
      const auto has = [&](const RecoverReport& other) { return HasFlush(other.flushes, flush); };
      if (EveryShard(spec, reports, has)) newest = flush;
    }
  }
  return newest;
}

std::vector<RecoverReport::Flush> RollbackOffers(const JobSpec& spec, const Reports& reports) {
  std::vector<RecoverReport::Flush> offers;
  const auto consider = [&](const RecoverReport::Flush& target) {
    for (const auto& offer : offers) {
      if (offer.decision == target.decision) return;
    }
    const auto can = [&](const RecoverReport& report) { return CanRestore(report, target); };
    if (EveryShard(spec, reports, can)) offers.push_back(target);
  };
  for (const auto& report : reports) {
    if (!report.has_value()) continue;
    for (const auto& flush : report->flushes) consider(flush);
    if (report->last_applied != nullptr) {
      consider({report->last_applied->step, report->last_applied->identity});
    }
  }
  std::sort(offers.begin(), offers.end(),
            [](const auto& a, const auto& b) { return a.step > b.step; });
  return offers;
}

}  // namespace orlop::step
