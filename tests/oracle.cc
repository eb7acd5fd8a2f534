#include "tests/oracle.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "server/step/identity.h"
#include "server/step/job.h"
#include "server/step/layout.h"

namespace orlop::step {

uint64_t MixBits(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15 + b + 0x2545f4914f6cdd1d;
  x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9;
  return x ^ (x >> 32);
}

namespace {

uint64_t Draw(uint64_t seed, const Workload::Try& at, uint64_t salt) {
  return MixBits(MixBits(MixBits(seed, at.generation * 64 + at.attempt), at.step), salt);
}

}  // namespace

bool Workload::IsLoad(int64_t step) const {
  return step == 0 || MixBits(seed, step * 8 + 1) % 9 == 0;
}

bool Workload::IsNonFinite(const Try& at) const { return Draw(seed, at, 2) % 6 == 0; }

bool Workload::IsAbsent(const Try& at, Rank rank, TensorId tensor) const {
  const uint64_t draw = Draw(seed, at, 3 + tensor * 16);
  return draw % 5 == 0 && (draw % 2 == 0 || rank == static_cast<Rank>(draw / 16 % 4));
}

bool Workload::IsLoaded(const Try& at, TensorId tensor) const {
  return at.step == 0 || Draw(seed, at, 4 + tensor * 16) % 2 == 0;
}

bool Workload::IsLeftOut(const Try& at, ShardId shard) const {
  return at.step == 0 && Draw(seed, at, 8 + shard * 16) % 12 == 0;
}

int64_t Workload::LoadedCount(const Try& at, TensorId tensor) const {
  const uint64_t draw = Draw(seed, at, 5 + tensor * 16);
  return draw % 2 == 0 ? static_cast<int64_t>(draw / 2 % 5) : -1;
}

uint64_t Workload::LoadedValue(const Try& at, TensorId tensor, int64_t element) const {
  return Draw(seed, at, 6 + tensor * 16 + element * 1024);
}

uint64_t Workload::Gradient(const Try& at, Rank rank, TensorId tensor, int64_t element) const {
  return Draw(seed, at, 7 + tensor * 16 + rank * 128 + element * 1024) % 1000;
}

uint64_t Workload::Update(uint64_t value, uint64_t gradient, int64_t applied_count,
                          double sum_of_squares, int64_t step) {
  const uint64_t scalars = MixBits(std::bit_cast<uint64_t>(sum_of_squares), applied_count);
  return MixBits(value ^ scalars, gradient * 131 + step);
}

Oracle::Oracle(Workload workload) : workload_(std::move(workload)) {}

bool Oracle::Fail(std::string what) {
  if (failure_.empty()) failure_ = std::move(what);
  return false;
}

void Oracle::AddGeneration(int64_t generation, int world_size) {
  world_size_[generation] = world_size;
}

// Tensor 0: everybody contributes everything. Others: rows are dealt out. A buffer: nobody.
bool Oracle::Contributes(const JobSpec& spec, int world_size, Rank rank, TensorId tensor,
                         int64_t element) {
  if (tensor == 0) return true;
  if (!spec.tensors[tensor].receives_gradient) return false;
  const Shape& shape = spec.tensors[tensor].shape;
  const int64_t columns = shape.size() == 2 ? shape[1] : 1;
  const int64_t row = element / columns;
  return row >= shape[0] * rank / world_size && row < shape[0] * (rank + 1) / world_size;
}

void Oracle::Observe(const DecisionPtr& decision) {
  for (const DecisionPtr& known : observed_) {
    if (known->identity == decision->identity) return;
  }
  observed_.push_back(decision);
}

bool Oracle::Replay(const DecisionPtr& decision) {
  const JobSpec& spec = *workload_.spec;
  const Workload::Try at{decision->generation, decision->step, decision->attempt};
  if (!world_size_.contains(at.generation)) return Fail("a decision of an unknown generation");
  const int world_size = world_size_[at.generation];
  Version next;
  next.decision = decision;
  if (history_.empty()) {
    for (const TensorSpec& tensor : spec.tensors) {
      next.values.emplace_back(*ElementCount(tensor.shape), 0);
    }
    next.applied_count.assign(spec.tensors.size(), 0);
  } else {
    next.values = history_.back().values;
    next.applied_count = history_.back().applied_count;
  }
  // The gradient, and what of it is absent.
  const bool is_load = workload_.IsLoad(at.step);
  double sum_of_squares = 0;
  std::vector<std::vector<uint64_t>> gradients(spec.tensors.size());
  std::vector<bool> touched(spec.tensors.size(), false);
  for (size_t t = 0; t < spec.tensors.size() && !is_load; ++t) {
    const TensorId tensor = static_cast<TensorId>(t);
    gradients[t].assign(next.values[t].size(), 0);
    for (Rank rank = 0; rank < world_size; ++rank) {
      if (workload_.IsAbsent(at, rank, tensor)) continue;
      for (size_t element = 0; element < gradients[t].size(); ++element) {
        if (!Contributes(spec, world_size, rank, tensor, element)) continue;
        touched[t] = true;
        gradients[t][element] += workload_.Gradient(at, rank, tensor, element);
      }
    }
    for (uint64_t g : gradients[t]) sum_of_squares += static_cast<double>(g) * g;
  }
  // An infinity sits in tensor 0, where every rank contributes.
  const bool skip = !is_load && workload_.IsNonFinite(at) && !workload_.IsAbsent(at, 0, 0);
  const DecisionKind kind = is_load ? DecisionKind::kLoad
                            : skip  ? DecisionKind::kSkip
                                    : DecisionKind::kApply;
  if (decision->kind != kind) {
    return Fail(absl::StrCat("step ", at.step, " was ", ToString(decision->kind), ", should be ",
                             ToString(kind)));
  }
  for (size_t t = 0; t < spec.tensors.size(); ++t) {
    const TensorId tensor = static_cast<TensorId>(t);
    if (is_load && workload_.IsLoaded(at, tensor)) {
      const int64_t count = workload_.LoadedCount(at, tensor);
      if (count >= 0) next.applied_count[t] = count;
      for (size_t element = 0; element < next.values[t].size(); ++element) {
        next.values[t][element] = workload_.LoadedValue(at, tensor, element);
      }
    }
    if (kind != DecisionKind::kApply || !touched[t]) continue;
    ++next.applied_count[t];
    for (size_t element = 0; element < next.values[t].size(); ++element) {
      next.values[t][element] = Workload::Update(next.values[t][element], gradients[t][element],
                                                 next.applied_count[t], sum_of_squares, at.step);
    }
  }
  history_.push_back(std::move(next));
  return true;
}

// Replays `decision` and the unacknowledged ones between it and what is known.
bool Oracle::Extend(const DecisionPtr& decision) {
  const int64_t next = static_cast<int64_t>(history_.size());
  if (decision->step > next) {
    DecisionPtr before;
    for (const DecisionPtr& known : observed_) {
      if (known->identity == decision->previous) before = known;
    }
    if (before == nullptr || before->step != decision->step - 1) {
      return Fail(absl::StrCat("step ", decision->step, " follows a step that nobody applied"));
    }
    if (!Extend(before)) return false;
  }
  const Digest previous = history_.empty() ? Digest{} : history_.back().decision->identity;
  if (decision->previous != previous) {
    return Fail(absl::StrCat("step ", decision->step,
                             " does not follow the history: a step was lost "
                             "or replaced"));
  }
  return Replay(decision);
}

bool Oracle::Acknowledge(const DecisionPtr& decision, int64_t epoch) {
  if (epoch < rollback_epoch_) return true;  // given before the rollback that the operator accepted
  if (Identify(*decision) != decision->identity)
    return Fail("a decision's identity is not its own");
  const int64_t known = static_cast<int64_t>(history_.size());
  if (decision->step < known) {
    if (history_[decision->step].decision->identity != decision->identity) {
      return Fail(absl::StrCat("step ", decision->step, " was acknowledged with two decisions"));
    }
  } else if (!Extend(decision)) {
    return false;
  }
  acknowledged_ = std::max(acknowledged_, decision->step);
  return true;
}

bool Oracle::RollBack(int64_t step, const Digest& decision, int64_t epoch) {
  if (workload_.spec->level != Level::kMemory) {
    return Fail("a rollback was needed at a level that promises none");
  }
  if (step >= static_cast<int64_t>(history_.size())) {
    for (const DecisionPtr& known : observed_) {
      if (known->identity == decision && !Extend(known)) return false;
    }
  }
  if (step >= static_cast<int64_t>(history_.size()) ||
      history_[step].decision->identity != decision) {
    return Fail(absl::StrCat("rollback to a step ", step, " that is not of the job's history"));
  }
  history_.resize(step + 1);
  acknowledged_ = std::min(acknowledged_, step);
  rollback_epoch_ = epoch;
  return true;
}

bool Oracle::CheckShard(ShardId shard, int64_t step, const Digest& decision,
                        const std::vector<uint64_t>& values, const char* where) {
  if (step < acknowledged_ && std::string_view(where) == "final") {
    return Fail(absl::StrCat("shard ", shard, " is at step ", step, ", step ", acknowledged_,
                             " was acknowledged"));
  }
  while (step >= static_cast<int64_t>(history_.size())) {  // committed, never acknowledged
    DecisionPtr last;
    for (const DecisionPtr& known : observed_) {
      if (known->identity == decision) last = known;
    }
    if (last == nullptr) return Fail("a shard reflects a decision that nobody applied");
    if (!Extend(last)) return false;
  }
  if (step < 0) return true;
  const Version& version = history_[step];
  const ShardSpec& spec = workload_.spec->shards[shard];
  if (version.decision->identity != decision) {
    return Fail(
        absl::StrCat(where, ": shard ", shard, " step ", step, " reflects another decision"));
  }
  for (uint64_t i = 0; i < spec.range.count(); ++i) {
    if (values[i] == version.values[spec.tensor][spec.range.begin + i]) continue;
    return Fail(absl::StrCat(where, ": shard ", shard, " element ", i, " of step ", step,
                             " differs from the replay"));
  }
  return true;
}

}  // namespace orlop::step
