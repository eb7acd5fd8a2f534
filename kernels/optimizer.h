// Optimizer steps in one fused pass: unscale and clip the gradient, decode the state, update,
// requantise, update the master, write the bf16 weight. Each optimizer is one file in
// kernels/optimizers/, listed in kernels/optimizers.cmake. This header is the interface that they
// share.
//   Units     Scalars are fp32. Optimizer::Prepare computes them once, in fp64, on the step leader;
//             they are sent as bits, because pow differs between libraries.
//   Error     bit-identical to the reference (reference.h) on every instruction set.
//   NaN, Inf  follow IEEE into fp32 state and the master (NaN canonical). Quantised state follows
//             quantize.h. An infinite master becomes NaN: infinity - infinity.
//   Threads   no shared state; disjoint ranges may run at once. No memory is allocated.
#pragma once
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/code_books4.h"  // IWYU pragma: export
#include "kernels/quantize.h"
#include "kernels/random.h"
#include "kernels/types.h"

namespace orlop::kernels {

// ---- What an optimizer is ----

struct HyperParameter {
  const char* name;
  double default_value;
  double least = 0;
  // The default is the largest value that fp32 scalars can carry.
  double limit = 1e30;
  bool limit_allowed = true;
  // True: the value must be 0 or 1.
  bool whole = false;
};

// One kind of optimizer state: one element per parameter, initially zero.
struct StateSpec {
  const char* name;  // torch's name
  CodeBook code_book;
  // Name of the hyper-parameter that is this state's decay rate; null if none is. If its value is
  // kFreezesFrom or more, Rounding::kNoZero rounds this state stochastically, because nearest
  // rounding would freeze it.
  const char* beta;
};
inline constexpr double kFreezesFrom = 0.9995;
inline constexpr size_t kMaxStates = 3;

// How much of a tensor a step must read before it changes any of it (whole_tensor.h).
enum class Scope : uint8_t {
  // Nothing.
  kElement,
  // The norms of two vectors (LAMB: the weights and the update).
  kNorms,
  // Adafactor. If the tensor has two or more dimensions, the sums of the squared gradient over rows
  // and over columns, from which each element's input is computed; then the norms.
  kFactored,
  // Muon. The whole update, which is made orthogonal and then is each element's input. The tensor
  // must have two dimensions.
  kMatrix,
};

// A tensor as a sequence of matrices: the last two dimensions are a matrix; all dimensions before
// them count the matrices.
struct MatrixShape {
  uint64_t matrices = 1, rows = 1, columns = 1;
  bool is_matrix = false;  // the tensor has two or more dimensions
  static MatrixShape Of(absl::Span<const uint64_t> shape);
  uint64_t count() const { return matrices * rows * columns; }
};

// The polynomial a x + b x^3 + c x^5, applied `steps` times to the singular values of a matrix of
// norm 1. Source: Jordan et al., Muon, 2024.
struct NewtonSchulz {
  float a, b, c;
  float eps;  // smallest norm that the matrix is divided by
  float steps;
};

// The update of row and column averages: average = lerp(average, mean, weight). A mean of averages
// is raised to `least` if it is smaller.
struct FactorAverage {
  float weight, rest, least;  // rest: 1 - weight
};

// The scalars of one step of a tensor, sent as fp32 bits: gradient_scale, the states to round
// stochastically (bit i of a small integer), then the optimizer's own.
inline constexpr size_t kMaxScalars = 16;
struct StepScalars {
  float values[kMaxScalars] = {};
  size_t count = 0;
  absl::Span<const float> span() const { return {values, count}; }
};

struct Optimizer {
  const char* name;  // the name in ConfigureOptimizer
  absl::Span<const HyperParameter> hyper_parameters;
  absl::Span<const StateSpec> states;
  size_t scalar_count;  // equals StepScalars::count

  // Checks the hyper-parameters. Status: InvalidArgument, naming the first value out of range and
  // its limit, or the count if it is not one value per hyper-parameter.
  absl::Status Validate(absl::Span<const double> values) const;
  // Computes the scalars of a step. `values` must be valid. applied_count: number of updates of
  // this tensor before this one.
  StepScalars Prepare(absl::Span<const double> values, int64_t applied_count,
                      float gradient_scale) const;
  // Returns false if this step neither reads nor writes the states (SGD without momentum).
  bool KeepsState(absl::Span<const float> scalars) const { return keeps_state(scalars.data()); }

  absl::Status (*validate)(const double* values);
  void (*prepare)(const double* values, double t, float* scalars);
  bool (*keeps_state)(const float* scalars);

  // True: the pushed values are new weights, not a gradient. They are neither clipped nor scaled,
  // and an absent value does not count as zero.
  bool takes_weights;

  // `begin` and `complete` set the scalars that only the owner of the tensor can compute. They use
  // IEEE operations only, so every machine gets the same bits. For Scope::kElement they do nothing.
  Scope scope;
  // Called before anything is measured.
  void (*begin)(const MatrixShape& shape, float* scalars);
  // Called after. `sum_squares`: the sums of squares of the two vectors that Measure computed.
  void (*complete)(const double* sum_squares, const MatrixShape& shape, float* scalars);
  FactorAverage (*averaging)(const float* scalars);  // kFactored; null for others
  NewtonSchulz (*iteration)(const float* scalars);   // kMatrix; null for others
};

// Returns the optimizer of that name; null if there is none. OptimizerNames() lists all names, for
// messages.
const Optimizer* FindOptimizer(absl::string_view name);
std::string OptimizerNames();

// ---- Computed by the step leader, once, in fp64 ----

// The norm of the averaged, unscaled gradient, and the factor that turns a raw sum of contributions
// into the gradient that the optimizer reads.
struct GradientScale {
  double norm = 0;
  float factor = 1;  // clip * inverse_scale / contributor_count
};

// Computes the norm and the factor. The clip factor is min(1, max_norm / (norm + 1e-6)), as in
// torch.nn.utils.clip_grad_norm_.
//   sum_squares        of the raw sum of contributions, over the whole job
//   inverse_scale      1 / loss scale
//   contributor_count  number of contributors under reduce="mean", 1 under "sum"
//   max_norm           0: no clipping
GradientScale PrepareGradientScale(double sum_squares, double inverse_scale,
                                   int64_t contributor_count, double max_norm);

// ---- Run by every owner of a shard ----

enum class StateFormat : uint8_t { kFp32, k8Bit, k4Bit };

// How the fp32 master is stored beside the bf16 weight.
enum class MasterFormat : uint8_t {
  kExact,  // int16 remainder (casts.h)
  // int8 remainder: bits32 = (weight << 16) + (remainder << 8), rounded stochastically.
  k24Bit,
  // No remainder: only the weight, rounded stochastically.
  kBF16Only,
};

// The bytes of one state of a range.
//   kFp32  values: fp32 [count]; absmax null
//   k8Bit  values: codes [count]; absmax [BlockCount(count)]
//   k4Bit  values: codes [(count + 1) / 2], the even element in the low half; absmax
//          [FourBitBlockCount(count)]
struct StateSpan {
  void* values = nullptr;
  float* absmax = nullptr;
};

// One more number per element that the rule of a kMatrix optimizer reads, and that of a kFactored
// one if the tensor has two or more dimensions. For element i of a range it is `values[i]`, or, if
// `values` is null, the product of the factors of its row and its column.
struct ElementInput {
  const float* values = nullptr;
  const float* row_factors = nullptr;     // [matrices * rows]
  const float* column_factors = nullptr;  // [matrices * columns]
  MatrixShape shape;
  // Index in the flattened tensor of the range's first element.
  uint64_t begin = 0;
  bool exists() const { return values != nullptr || row_factors != nullptr; }
};

// One step of one range. A range begins on a block boundary of its tensor and has whole blocks,
// except at the end of the tensor. Arrays are contiguous, aligned to their elements, and do not
// overlap, except that new_weight may be the same array as weight.
struct RangeStep {
  const Optimizer* optimizer = nullptr;
  absl::Span<const float> scalars;  // from Optimizer::Prepare
  TypedSpan gradient;               // the raw sum, at any alignment
  const uint16_t* weight = nullptr;
  // May be another array than `weight`, so that readers of the old version are not disturbed.
  uint16_t* new_weight = nullptr;
  // int16_t or int8_t, updated in place; unused for kBF16Only.
  void* remainder = nullptr;
  MasterFormat master = MasterFormat::kExact;
  StateFormat format = StateFormat::kFp32;
  Rounding rounding = Rounding::kNoZero;
  // In the order of the optimizer's states.
  StateSpan states[kMaxStates];
  ElementInput input;
  // The key of the tensor and step. Only stochastic rounding reads it.
  RandomKey random;
  // Index in the tensor of the range's first block.
  uint64_t first_block = 0;
};

// Returns the step of elements begin .. begin + count of a range, or of those that exist. `begin`
// must be on a block boundary.
RangeStep PartOf(const RangeStep& step, size_t begin, size_t count);

// Applies one step to one range. Status: InvalidArgument for an unknown optimizer, a null,
// misaligned or overlapping array, another count of scalars, or a NaN among them; then nothing was
// written.
absl::Status Step(const RangeStep& step);

}  // namespace orlop::kernels
