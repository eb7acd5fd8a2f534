// Finds optimizers by name, and computes what the step leader needs once per step, in fp64.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/blocks.h"
#include "kernels/optimizer.h"

namespace orlop::kernels {

#define ORLOP_OPTIMIZER(name) OptimizerUnit name##Unit();
#include "kernels/optimizers.inc"
#undef ORLOP_OPTIMIZER

absl::Span<const OptimizerUnit> OptimizerUnits() {
  static const auto* const units = new std::vector<OptimizerUnit>{
#define ORLOP_OPTIMIZER(name) name##Unit(),
#include "kernels/optimizers.inc"
#undef ORLOP_OPTIMIZER
  };
  return *units;
}

const Optimizer* FindOptimizer(absl::string_view name) {
  for (const OptimizerUnit& unit : OptimizerUnits()) {
    if (name == unit.optimizer.name) return &unit.optimizer;
  }
  return nullptr;
}

std::string OptimizerNames() {
  std::string names;
  for (const OptimizerUnit& unit : OptimizerUnits())
    absl::StrAppend(&names, names.empty() ? "" : ", ", unit.optimizer.name);
  return names;
}

namespace {

absl::Status CheckRange(const HyperParameter& parameter, double value) {
  const double limit = parameter.limit;
  const bool within = value >= parameter.least && value <= limit &&
                      (value != limit || parameter.limit_allowed) &&
                      (!parameter.whole || value == std::floor(value));
  if (within) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(parameter.name, " is ", value, ", must be ",
                   parameter.whole ? absl::StrCat(parameter.least, " or ", limit)
                                   : absl::StrCat("from ", parameter.least, " to ", limit),
                   parameter.limit_allowed ? "" : ", which is excluded"));
}

}  // namespace

absl::Status Optimizer::Validate(absl::Span<const double> values) const {
  if (values.size() != hyper_parameters.size()) {
    return absl::InvalidArgumentError(absl::StrCat(name, " takes ", hyper_parameters.size(),
                                                   " hyper-parameters, not ", values.size()));
  }
  absl::Status status;
  for (size_t i = 0; i < values.size(); ++i)
    status.Update(CheckRange(hyper_parameters[i], values[i]));
  if (status.ok()) status = validate(values.data());
  return status;
}

StepScalars Optimizer::Prepare(absl::Span<const double> values, int64_t applied_count,
                               float gradient_scale) const {
  StepScalars scalars;
  scalars.count = scalar_count;
  scalars.values[0] = gradient_scale;
  uint32_t frozen = 0;
  for (size_t s = 0; s < states.size(); ++s) {
    for (size_t i = 0; i < values.size() && states[s].beta != nullptr; ++i) {
      const bool slow = absl::string_view(hyper_parameters[i].name) == states[s].beta &&
                        values[i] >= kFreezesFrom;
      if (slow) frozen |= 1u << s;
    }
  }
  scalars.values[1] = static_cast<float>(frozen);
  prepare(values.data(), static_cast<double>(applied_count) + 1, scalars.values);
  return scalars;
}

GradientScale PrepareGradientScale(double sum_squares, double inverse_scale,
                                   int64_t contributor_count, double max_norm) {
  const double unscale = inverse_scale / static_cast<double>(contributor_count);
  const double norm = std::sqrt(sum_squares) * unscale;
  const double clip = max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1.0;
  return {norm, static_cast<float>(clip * unscale)};
}

}  // namespace orlop::kernels
