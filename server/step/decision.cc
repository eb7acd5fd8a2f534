#include "server/step/decision.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "server/step/identity.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/messages.h"
#include "server/step/reason.h"
#include "server/step/requests.h"

namespace orlop::step {
namespace {

absl::Status Disagree(const std::string& text) {
  return Because(Reason::kHyperParameters, absl::InvalidArgumentError(text));
}

bool SameBits(double a, double b) {
  return std::bit_cast<uint64_t>(a) == std::bit_cast<uint64_t>(b);
}

bool SameRequest(const CommitRequest& a, const CommitRequest& b) {
  return a.is_load == b.is_load && a.groups == b.groups && a.absent == b.absent &&
         SameBits(a.scale, b.scale);
}

absl::Status CheckAbsent(const JobSpec& spec, const std::vector<TensorId>& absent) {
  for (size_t i = 0; i < absent.size(); ++i) {
    const TensorId tensor = absent[i];
    if (tensor < 0 || tensor >= static_cast<TensorId>(spec.tensors.size()) ||
        (i > 0 && absent[i - 1] >= tensor)) {
      return Disagree(
          absl::StrCat("absent tensors must be known and ascending, got number ", tensor));
    }
  }
  return absl::OkStatus();
}

// One entry per shard, in manifest order.
absl::Status CombineStaged(const DecisionInputs& inputs, std::vector<const ShardStaged*>* staged) {
  staged->assign(inputs.spec->shards.size(), nullptr);
  for (const StageReport* report : inputs.reports) {
    if (report == nullptr) continue;
    for (const ShardStaged& shard : report->shards) {
      const ShardStaged*& known = (*staged)[shard.shard];
      if (known == nullptr) known = &shard;
      if (known->digest == shard.digest && known->absent == shard.absent) continue;
      return absl::DataLossError(
          absl::StrCat("shard ", shard.shard, ": its copies have staged different bytes"));
    }
  }
  const auto missing = std::find(staged->begin(), staged->end(), nullptr);
  if (missing == staged->end()) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("shard ", missing - staged->begin(),
                                          ": no server has told what it staged of it"));
}

absl::Status CheckScales(const DecisionInputs& inputs) {
  const double scale = inputs.commit->scale;
  for (size_t server = 0; server < inputs.reports.size(); ++server) {
    const StageReport* report = inputs.reports[server];
    if (report == nullptr || !report->has_scale || report->is_load) continue;
    if (SameBits(report->scale, scale)) continue;
    return Disagree(absl::StrCat("gradients on server ", server, " carry scale ", report->scale,
                                 ", CommitStep says ", scale));
  }
  return absl::OkStatus();
}

// Fills untouched and applied_count.
absl::Status CountTensors(const DecisionInputs& inputs,
                          const std::vector<const ShardStaged*>& staged, DecisionRecord* decision) {
  const JobSpec& spec = *inputs.spec;
  const size_t tensors = spec.tensors.size();
  decision->untouched.assign(tensors, 1);
  std::vector<int64_t> loaded(tensors, -1);
  for (size_t shard = 0; shard < staged.size(); ++shard) {
    const TensorId tensor = spec.shards[shard].tensor;
    if (!staged[shard]->absent) decision->untouched[tensor] = 0;
    const int64_t count = staged[shard]->loaded_applied_count;
    if (count >= 0 && loaded[tensor] >= 0 && loaded[tensor] != count) {
      return Disagree(absl::StrCat("tensor ", spec.tensors[tensor].name, ": applied_count ",
                                   loaded[tensor], " and ", count, " in one LOAD"));
    }
    loaded[tensor] = std::max(loaded[tensor], count);
  }
  decision->applied_count.assign(tensors, 0);
  if (inputs.previous != nullptr) decision->applied_count = inputs.previous->applied_count;
  for (size_t tensor = 0; tensor < tensors; ++tensor) {
    if (decision->kind == DecisionKind::kLoad && loaded[tensor] >= 0) {
      decision->applied_count[tensor] = loaded[tensor];
    }
    if (decision->kind == DecisionKind::kApply && !decision->untouched[tensor]) {
      ++decision->applied_count[tensor];
    }
  }
  return absl::OkStatus();
}

// Fills what follows from the staged bytes: their digest, norm and non-finite count, and the kind.
void SumStaged(const std::vector<const ShardStaged*>& staged, bool is_load,
               DecisionRecord* decision) {
  DigestBuilder digest;
  for (const ShardStaged* shard : staged) {  // manifest order: the number of servers changes no bit
    digest.Add(shard->digest);
    decision->sum_of_squares += shard->sum_of_squares;
    decision->non_finite_count += shard->non_finite_count;
  }
  decision->staged = digest.Finish();
  decision->kind = decision->non_finite_count > 0 ? DecisionKind::kSkip : DecisionKind::kApply;
  if (is_load) decision->kind = DecisionKind::kLoad;
}

}  // namespace

absl::Status CompareGroups(const CommitRequest& commit, const CommitRequest& before) {
  if (commit.groups.size() != before.groups.size()) {
    return Disagree(absl::StrCat("rank ", commit.rank, " has ", commit.groups.size(),
                                 " parameter groups, rank ", before.rank, " has ",
                                 before.groups.size()));
  }
  for (size_t group = 0; group < commit.groups.size(); ++group) {
    const auto& left = commit.groups[group].values;
    const auto& right = before.groups[group].values;
    if (left.size() != right.size()) {
      return Disagree(absl::StrCat("group ", group, ": ranks ", commit.rank, " and ", before.rank,
                                   " send different sets of hyper-parameters"));
    }
    for (size_t i = 0; i < left.size(); ++i) {
      if (left[i] == right[i]) continue;
      return Disagree(absl::StrCat("group ", group, ": ", left[i].name,
                                   " differs: ", std::bit_cast<double>(left[i].bits), " from rank ",
                                   commit.rank, ", ", std::bit_cast<double>(right[i].bits),
                                   " from rank ", before.rank, " before"));
    }
  }
  return absl::OkStatus();
}

absl::Status CompareCommits(const JobSpec& spec, const CommitRequest& commit,
                            const std::vector<const CommitRequest*>& by_rank) {
  if (commit.rank < 0 || commit.rank >= static_cast<Rank>(by_rank.size())) {
    return Disagree(absl::StrCat("rank ", commit.rank, " of a world of ", by_rank.size()));
  }
  if (absl::Status known = CheckAbsent(spec, commit.absent); !known.ok()) return known;
  const CommitRequest* own = by_rank[commit.rank];
  if (own != nullptr && !SameRequest(*own, commit)) {
    if (absl::Status same = CompareGroups(commit, *own); !same.ok()) return same;
    return absl::AlreadyExistsError(absl::StrCat("rank ", commit.rank, " has committed step ",
                                                 commit.step, " attempt ", commit.attempt,
                                                 " with other values"));
  }
  const auto other = std::find_if(by_rank.begin(), by_rank.end(),
                                  [](const CommitRequest* request) { return request != nullptr; });
  if (other == by_rank.end()) return absl::OkStatus();
  if ((*other)->is_load != commit.is_load) {
    return Disagree(
        absl::StrCat("ranks ", (*other)->rank, " and ", commit.rank, " commit a LOAD and a step"));
  }
  if (!SameBits((*other)->scale, commit.scale)) {
    return Disagree(absl::StrCat("scale ", commit.scale, " of rank ", commit.rank, ", rank ",
                                 (*other)->rank, " has ", (*other)->scale));
  }
  return CompareGroups(commit, **other);
}

absl::StatusOr<DecisionPtr> BuildDecision(const DecisionInputs& inputs,
                                          const ScalarBuilder& build_scalars) {
  std::vector<const ShardStaged*> staged;
  if (absl::Status status = CombineStaged(inputs, &staged); !status.ok()) return status;
  if (absl::Status status = CheckScales(inputs); !status.ok()) return status;
  auto decision = std::make_shared<DecisionRecord>();
  decision->scale = inputs.commit->scale;
  decision->epoch = inputs.epoch;
  decision->generation = inputs.generation;
  decision->step = inputs.step;
  decision->attempt = inputs.attempt;
  decision->arithmetic_version = inputs.spec->arithmetic_version;
  if (inputs.previous != nullptr) decision->previous = inputs.previous->identity;
  SumStaged(staged, inputs.commit->is_load, decision.get());
  absl::Status status = CountTensors(inputs, staged, decision.get());
  if (!status.ok()) return status;
  if (decision->kind == DecisionKind::kApply) {
    absl::StatusOr<std::string> scalars = build_scalars(
        {decision->step, &inputs.commit->groups, &decision->applied_count, &decision->untouched,
         decision->sum_of_squares, decision->scale, inputs.contributor_count});
    if (!scalars.ok()) {
      const bool is_disagreement = absl::IsInvalidArgument(scalars.status());
      return is_disagreement ? Because(Reason::kHyperParameters, scalars.status())
                             : scalars.status();
    }
    decision->scalars = *std::move(scalars);
  }
  decision->identity = Identify(*decision);
  return DecisionPtr(std::move(decision));
}

}  // namespace orlop::step
