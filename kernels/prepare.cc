// Hyper-parameters to kernel-ready scalars, in double, once per step and parameter group.
#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "kernels/optimizer.h"

namespace orlop::kernels {
namespace {

// What fp32 scalars can carry.
constexpr double kLargestScalar = 1e30;

absl::Status CheckRange(absl::string_view name, double value, double limit, bool limit_allowed) {
  if (value >= 0 && (value < limit || (limit_allowed && value == limit))) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " is ", value, ", must be from 0 to ", limit,
                                                 limit_allowed ? "" : ", which is excluded"));
}

}  // namespace

GradientScale PrepareGradientScale(double sum_squares, double inverse_scale,
                                   int64_t contributor_count, double max_norm) {
  const double unscale = inverse_scale / static_cast<double>(contributor_count);
  const double norm = std::sqrt(sum_squares) * unscale;
  const double clip = max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1.0;
  return {norm, static_cast<float>(clip * unscale)};
}

absl::Status Validate(const AdamWConfig& config) {
  absl::Status status = CheckRange("lr", config.learning_rate, kLargestScalar, true);
  status.Update(CheckRange("betas[0]", config.beta1, 1, false));
  status.Update(CheckRange("betas[1]", config.beta2, 1, false));
  status.Update(CheckRange("eps", config.eps, kLargestScalar, true));
  status.Update(CheckRange("weight_decay", config.weight_decay, kLargestScalar, true));
  return status;
}

absl::Status Validate(const SgdConfig& config) {
  absl::Status status = CheckRange("lr", config.learning_rate, kLargestScalar, true);
  status.Update(CheckRange("momentum", config.momentum, kLargestScalar, true));
  status.Update(CheckRange("weight_decay", config.weight_decay, kLargestScalar, true));
  if (!(std::fabs(config.dampening) <= kLargestScalar)) {
    status.Update(absl::InvalidArgumentError(absl::StrCat(
        "dampening is ", config.dampening, ", must be a number up to ", kLargestScalar)));
  }
  if (config.nesterov && (config.momentum == 0 || config.dampening != 0)) {
    status.Update(absl::InvalidArgumentError(
        absl::StrCat("nesterov needs momentum > 0 and dampening 0, but momentum is ",
                     config.momentum, " and dampening is ", config.dampening)));
  }
  return status;
}

AdamWScalars PrepareAdamW(const AdamWConfig& config, int64_t applied_count, float gradient_scale) {
  const double t = static_cast<double>(applied_count) + 1;
  const double bias_correction1 = 1 - std::pow(config.beta1, t);
  const double bias_correction2 = 1 - std::pow(config.beta2, t);
  AdamWScalars scalars;
  scalars.gradient_scale = gradient_scale;
  scalars.beta1 = static_cast<float>(config.beta1);
  scalars.beta2 = static_cast<float>(config.beta2);
  scalars.one_minus_beta1 = static_cast<float>(1 - config.beta1);
  scalars.one_minus_beta2 = static_cast<float>(1 - config.beta2);
  scalars.eps = static_cast<float>(config.eps);
  scalars.step_size = static_cast<float>(config.learning_rate / bias_correction1);
  scalars.inverse_sqrt_bias_correction2 = static_cast<float>(1 / std::sqrt(bias_correction2));
  scalars.decay = static_cast<float>(config.learning_rate * config.weight_decay);
  return scalars;
}

SgdScalars PrepareSgd(const SgdConfig& config, int64_t applied_count, float gradient_scale) {
  SgdScalars scalars;
  scalars.gradient_scale = gradient_scale;
  scalars.learning_rate = static_cast<float>(config.learning_rate);
  scalars.momentum = static_cast<float>(config.momentum);
  scalars.one_minus_dampening = static_cast<float>(1 - config.dampening);
  scalars.weight_decay = static_cast<float>(config.weight_decay);
  scalars.nesterov = config.nesterov;
  scalars.first_step = applied_count == 0;
  return scalars;
}

}  // namespace orlop::kernels
