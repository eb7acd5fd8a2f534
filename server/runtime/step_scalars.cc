#include "server/runtime/step_scalars.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "kernels/optimizer.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/convert.h"
#include "proto/status.h"
#include "server/job/job_model.h"
#include "server/shards/shard_store.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/leader.h"

namespace orlop::server {
namespace {

// Returns the optimizer of a group. It exists, because the configuration was validated.
const kernels::Optimizer& OptimizerOf(const JobModel& model, int group) {
  return *kernels::FindOptimizer(model.definition().optimizer().groups(group).optimizer());
}

std::vector<double> ValuesOf(const step::ParameterGroup& group) {
  std::vector<double> values;
  values.reserve(group.values.size());
  for (const step::HyperParameter& value : group.values)
    values.push_back(std::bit_cast<double>(value.bits));
  return values;
}

absl::Status BadValue(int group, const std::string& name, const std::string& what) {
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::HYPER_PARAMETERS);
  detail.set_field(absl::StrCat("groups[", group, "].", name));
  return MakeError(absl::StatusCode::kInvalidArgument, absl::StrCat(detail.field(), ": ", what),
                   detail);
}

absl::Status AnewError() {
  return absl::FailedPreconditionError(
      "the optimizer was configured anew since this CommitStep: commit again");
}

}  // namespace

absl::StatusOr<int64_t> ContributionsPerElement(const JobModel& model, const step::Layout& layout) {
  std::map<int32_t, double> elements;
  std::map<int32_t, bool> sum;
  for (const std::vector<step::Contribution>& rank : layout.by_rank) {
    for (const step::Contribution& contribution : rank) {
      if (contribution.mode == step::Mode::kNone) continue;
      sum[contribution.tensor] = contribution.mode == step::Mode::kSum;
      for (const Box& box : contribution.boxes)
        elements[contribution.tensor] += static_cast<double>(BoxElementCount(box));
    }
  }
  int64_t count = 0;
  int32_t first = 0;
  for (const auto& [tensor, total] : elements) {
    const int64_t own =
        sum[tensor]
            ? std::llround(total / static_cast<double>(model.tensors()[tensor].element_count))
            : 1;
    if (count == 0) first = tensor;
    if (count != 0 && own != count) {
      return absl::InvalidArgumentError(absl::StrCat(
          "reduce=mean: '", model.tensors()[first].name, "' sums ", count, " contributions and '",
          model.tensors()[tensor].name, "' ", own, "; use reduce=sum"));
    }
    count = own;
  }
  return std::max<int64_t>(count, 1);
}

absl::StatusOr<std::vector<step::ParameterGroup>> ParseGroups(
    const JobModel& model, const google::protobuf::RepeatedPtrField<v1::GroupValues>& groups) {
  const int expected = model.definition().optimizer().groups_size();
  if (groups.size() != expected) {
    return BadValue(groups.size(), "count",
                    absl::StrCat(groups.size(), " groups; the job has ", expected));
  }
  std::vector<step::ParameterGroup> parsed(expected);
  for (int g = 0; g < expected; ++g) {
    const kernels::Optimizer& optimizer = OptimizerOf(model, g);
    for (const kernels::HyperParameter& parameter : optimizer.hyper_parameters) {
      const auto it = groups[g].values().find(parameter.name);
      if (it == groups[g].values().end()) return BadValue(g, parameter.name, "missing");
      parsed[g].values.push_back(
          {absl::StrCat("groups[", g, "].", parameter.name), std::bit_cast<uint64_t>(it->second)});
    }
    for (const auto& [name, value] : groups[g].values()) {
      const bool known = std::any_of(
          optimizer.hyper_parameters.begin(), optimizer.hyper_parameters.end(),
          [&](const kernels::HyperParameter& parameter) { return parameter.name == name; });
      if (!known) return BadValue(g, name, "unknown for this optimizer");
    }
    const absl::Status valid = optimizer.Validate(ValuesOf(parsed[g]));
    if (!valid.ok()) return BadValue(g, "values", std::string(valid.message()));
  }
  return parsed;
}

absl::StatusOr<std::string> BuildScalars(const JobModel& model, int64_t contributions_per_element,
                                         const step::ScalarInputs& inputs) {
  const v1::ConfigureOptimizerRequest& optimizer = model.definition().optimizer();
  if (static_cast<int>(inputs.groups->size()) != optimizer.groups_size()) {
    return AnewError();
  }
  for (int g = 0; g < optimizer.groups_size(); ++g) {
    if ((*inputs.groups)[g].values.size() != OptimizerOf(model, g).hyper_parameters.size())
      return AnewError();
  }
  const int64_t count = optimizer.reduce() == "sum" ? 1 : contributions_per_element;
  const kernels::GradientScale scale = kernels::PrepareGradientScale(
      inputs.sum_of_squares, 1.0 / inputs.scale, count, optimizer.max_norm());
  v1::StepScalars out;
  out.set_gradient_norm(scale.norm);
  out.set_clip_factor(
      optimizer.max_norm() > 0 ? std::min(1.0, optimizer.max_norm() / (scale.norm + 1e-6)) : 1.0);
  std::map<std::pair<int, int64_t>, v1::StepScalars::Set*> made;
  for (uint32_t t = 0; t < model.tensors().size(); ++t) {
    const int group = model.GroupOf(t);
    if (group < 0 || (*inputs.untouched)[t] != 0) continue;
    const int64_t applied = (*inputs.applied_count)[t];
    v1::StepScalars::Set*& set = made[{group, applied}];
    if (set != nullptr) {
      set->add_tensors(t);
      continue;
    }
    set = out.add_sets();
    set->add_tensors(t);
    const kernels::StepScalars scalars =
        OptimizerOf(model, group)
            .Prepare(ValuesOf((*inputs.groups)[group]), applied - 1, scale.factor);
    for (const float value : scalars.span())
      if (!std::isfinite(value))
        return BadValue(group, "values", "beyond what fp32 holds, once multiplied as a step needs");
    for (const float value : scalars.span()) set->add_bits(std::bit_cast<uint32_t>(value));
  }
  return out.SerializeAsString();
}

absl::StatusOr<DecisionScalars> DecisionScalars::Parse(const JobModel& model,
                                                       const step::DecisionRecord& decision) {
  v1::StepScalars scalars;
  if (!scalars.ParseFromString(decision.scalars))
    return absl::DataLossError("the scalars of a decision cannot be read");
  std::vector<const v1::StepScalars::Set*> sets(model.tensors().size());
  for (const v1::StepScalars::Set& set : scalars.sets())
    for (const uint32_t t : set.tensors())
      if (t < sets.size()) sets[t] = &set;
  DecisionScalars out;
  for (uint32_t t = 0; t < model.tensors().size(); ++t) {
    ShardUpdate update;
    update.step = decision.step;
    update.kind = decision.kind == step::DecisionKind::kLoad   ? ShardUpdate::Kind::kLoad
                  : decision.kind == step::DecisionKind::kSkip ? ShardUpdate::Kind::kSkip
                                                               : ShardUpdate::Kind::kApply;
    if (update.kind == ShardUpdate::Kind::kApply) {
      const int group = model.GroupOf(t);
      update.untouched = group < 0 || (t < decision.untouched.size() && decision.untouched[t] != 0);
      if (!update.untouched) {
        const size_t count = OptimizerOf(model, group).scalar_count;
        if (sets[t] == nullptr || sets[t]->bits_size() != static_cast<int>(count)) {
          return absl::DataLossError(
              absl::StrCat("a decision has no scalars for '", model.tensors()[t].name, "'"));
        }
        update.scalars.count = count;
        for (size_t i = 0; i < count; ++i)
          update.scalars.values[i] = std::bit_cast<float>(sets[t]->bits(static_cast<int>(i)));
        update.random = kernels::RandomKey::Of(model.definition().manifest().seed(), t,
                                               static_cast<uint64_t>(decision.step));
      }
    }
    out.updates_.push_back(update);
  }
  return out;
}

void FillCommitted(const step::DecisionRecord& decision, v1::CommitStepResponse* response) {
  response->set_step(decision.step);
  response->set_nonfinite_count(decision.non_finite_count);
  response->set_clip_factor(1);
  ToWire(decision.identity, response->mutable_decision());
  switch (decision.kind) {
    case step::DecisionKind::kLoad:
      response->set_outcome(v1::CommitStepResponse::LOADED);
      return;
    case step::DecisionKind::kSkip:
      response->set_outcome(v1::CommitStepResponse::SKIP);
      response->set_gradient_norm(std::numeric_limits<double>::quiet_NaN());
      return;
    case step::DecisionKind::kApply:
      break;
  }
  response->set_outcome(v1::CommitStepResponse::APPLY);
  v1::StepScalars scalars;
  if (scalars.ParseFromString(decision.scalars)) {
    response->set_gradient_norm(scalars.gradient_norm());
    response->set_clip_factor(scalars.clip_factor());
  }
}

}  // namespace orlop::server
