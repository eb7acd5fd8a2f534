// Optimizer steps in one fused pass: unscale and clip the gradient, update the state, requantise
// it, update the exact master, write the bf16 weight.
//   Shapes    every span [count], absmax [BlockCount(count)], contiguous, not overlapping, except
//             that new_weight may be the very span of weight. A range starts on a block boundary of
//             its tensor and holds whole blocks, except a tensor's last.
//   Units     scalars are fp32, computed once in fp64 by Prepare* on the step leader and shipped as
//             bits: pow differs between libraries.
//   Error     bit-identical to the reference (reference.h) on every instruction set. The master
//             after 50 steps of AdamW is within 1.5 times torch.optim.AdamW's error against fp64.
//   NaN, Inf  follow IEEE into the fp32 state and the master (NaN canonical). 8-bit state follows
//             quantize.h. An infinite master becomes NaN: infinity - infinity.
//   Status    InvalidArgument if counts differ; then nothing was written.
//   Threads   no shared state; disjoint ranges may run at once.
//   Source    torch.optim.AdamW and torch.optim.SGD; Loshchilov and Hutter, Decoupled Weight Decay
//             Regularization, 2019, algorithm 2.
#pragma once
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/quantize.h"
#include "kernels/types.h"

namespace orlop::kernels {

// ---- What the step leader computes, once, in double ----

// Norm of the averaged, unscaled gradient and the one factor that turns a raw sum into what the
// optimizer consumes.
struct GradientScale {
  double norm = 0;
  float factor = 1;  // clip * inverse_scale / contributor_count
};

// sum_squares: of the raw sum over the whole job. inverse_scale: 1 / loss scale. contributor_count:
// n under reduce="mean", 1 under "sum". max_norm: 0 = no clipping.
// clip = min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_.
GradientScale PrepareGradientScale(double sum_squares, double inverse_scale,
                                   int64_t contributor_count, double max_norm);

// torch.optim.AdamW's arguments and defaults.
struct AdamWConfig {
  double learning_rate = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 1e-2;
};

// torch.optim.SGD's arguments and defaults.
struct SgdConfig {
  double learning_rate = 1e-3;
  double momentum = 0;  // 0 = no momentum_buffer is kept
  double dampening = 0;
  double weight_decay = 0;  // L2: added to the gradient
  bool nesterov = false;
};

// InvalidArgument names the first field out of torch's range, its value and the limit.
absl::Status Validate(const AdamWConfig& config);
absl::Status Validate(const SgdConfig& config);

// Shipped in the decision record as fp32 bits, one set per parameter group and applied_count.
struct AdamWScalars {
  float gradient_scale = 1;  // GradientScale::factor
  float beta1 = 0;
  float beta2 = 0;
  float one_minus_beta1 = 0;  // rounded from fp64: not 1 - (fp32)beta1
  float one_minus_beta2 = 0;
  float eps = 0;
  float step_size = 0;                      // learning_rate / (1 - beta1^t)
  float inverse_sqrt_bias_correction2 = 0;  // 1 / sqrt(1 - beta2^t)
  float decay = 0;                          // learning_rate * weight_decay
};

struct SgdScalars {
  float gradient_scale = 1;
  float learning_rate = 0;
  float momentum = 0;
  float one_minus_dampening = 0;
  float weight_decay = 0;
  bool nesterov = false;
  bool first_step = false;  // the momentum buffer becomes the gradient, dampening not applied
};

// applied_count: updates this tensor has had before this one, so t = applied_count + 1.
// Config must be valid (Validate).
AdamWScalars PrepareAdamW(const AdamWConfig& config, int64_t applied_count, float gradient_scale);
SgdScalars PrepareSgd(const SgdConfig& config, int64_t applied_count, float gradient_scale);

// ---- What every owner of a shard runs ----

// The master before and after. new_weight may be another buffer, so that readers of the old version
// go on undisturbed, or the same span.
struct MasterSpans {
  absl::Span<const uint16_t> weight;
  absl::Span<int16_t> remainder;  // in place
  absl::Span<uint16_t> new_weight;
};

struct AdamWFp32State {
  absl::Span<float> exp_avg;
  absl::Span<float> exp_avg_sq;
};

struct AdamW8BitState {
  absl::Span<uint8_t> exp_avg;  // signed codes; fresh state: code 127, absmax 0
  absl::Span<float> exp_avg_absmax;
  absl::Span<uint8_t> exp_avg_sq;  // unsigned codes; fresh state: code 0, absmax 0
  absl::Span<float> exp_avg_sq_absmax;
  Rounding exp_avg_sq_rounding = Rounding::kNoZero;
};

// Empty when momentum is 0.
struct SgdFp32State {
  absl::Span<float> momentum_buffer;
};

struct Sgd8BitState {
  absl::Span<uint8_t> momentum_buffer;  // signed codes
  absl::Span<float> momentum_buffer_absmax;
};

// With g = gradient * gradient_scale, p the master, m = exp_avg, v = exp_avg_sq:
//   m = lerp(m, g, 1 - beta1); v = lerp(v, g * g, 1 - beta2)
//   p = p - (decay * p + step_size * (m / (sqrt(v) * inverse_sqrt_bias_correction2 + eps)))
// which is torch's rule: decay first, eps after bias correction; one rounding of p. The update uses
// m and v before they are requantised.
absl::Status AdamWFp32(const AdamWScalars& scalars, TypedSpan gradient, MasterSpans master,
                       AdamWFp32State state);
absl::Status AdamW8Bit(const AdamWScalars& scalars, TypedSpan gradient, MasterSpans master,
                       AdamW8BitState state);

// With g = gradient * gradient_scale + weight_decay * p and b = momentum_buffer:
//   b = first_step ? g : momentum * b + (1 - dampening) * g
//   p = p - learning_rate * (momentum == 0 ? g : nesterov ? g + momentum * b : b)
absl::Status SgdFp32(const SgdScalars& scalars, TypedSpan gradient, MasterSpans master,
                     SgdFp32State state);
absl::Status Sgd8Bit(const SgdScalars& scalars, TypedSpan gradient, MasterSpans master,
                     Sgd8BitState state);

}  // namespace orlop::kernels
