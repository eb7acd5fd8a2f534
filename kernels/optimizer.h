// Optimizer steps in one fused pass: unscale and clip the gradient, decode the state, update,
// requantise, update the master, write the bf16 weight. Every optimizer is one file in
// kernels/optimizers/, named in kernels/optimizers.cmake; this is what they share.
//   Units     scalars are fp32, computed once in fp64 by Optimizer::Prepare on the step leader and
//             shipped as bits: pow differs between libraries.
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
#include "kernels/code_books4.h"
#include "kernels/quantize.h"
#include "kernels/random.h"
#include "kernels/types.h"

namespace orlop::kernels {

// ---- What an optimizer is ----

struct HyperParameter {
  const char* name;
  double default_value;
  double least = 0;
  double limit = 1e30;  // what fp32 scalars can carry
  bool limit_allowed = true;
  bool whole = false;  // 0 or 1
};

// One kind of state, an element per parameter, zero at first.
struct StateSpec {
  const char* name;  // torch's
  CodeBook code_book;
  // The hyper-parameter that says how slowly it changes; null: none does. From kFreezesFrom on,
  // Rounding::kNoZero rounds this state stochastically: nearest rounding would freeze it.
  const char* beta;
};
inline constexpr double kFreezesFrom = 0.9995;
inline constexpr size_t kMaxStates = 3;

// What a step reads of a whole tensor before it changes any of it (whole_tensor.h).
enum class Scope : uint8_t {
  kElement,   // nothing
  kNorms,     // the norms of two vectors (LAMB: the weights and the update)
  kFactored,  // with two or more dimensions, first the sums of the squared gradient over rows and
              // over columns, from which each element's input is made; then the norms (Adafactor)
  kMatrix,    // the whole update, which is made orthogonal and comes back as each element's input
              // (Muon); two dimensions
};

// A tensor as a row of matrices: its last two dimensions, and all before them as one.
struct MatrixShape {
  uint64_t matrices = 1, rows = 1, columns = 1;
  bool is_matrix = false;  // two or more dimensions
  static MatrixShape Of(absl::Span<const uint64_t> shape);
  uint64_t count() const { return matrices * rows * columns; }
};

// The polynomial a x + b x^3 + c x^5, applied `steps` times to the singular values of a matrix of
// norm 1: Jordan et al., Muon, 2024.
struct NewtonSchulz {
  float a, b, c;
  float eps;  // the least norm that is divided out
  float steps;
};

// average = lerp(average, mean, weight) over rows and columns; `least` that a mean of averages may
// be.
struct FactorAverage {
  float weight, rest, least;  // rest: 1 - weight
};

// What one step of a tensor needs beside its bytes, as fp32 bits on the wire: gradient_scale, the
// states to round stochastically (bit i of a small number), then the optimizer's own.
inline constexpr size_t kMaxScalars = 16;
struct StepScalars {
  float values[kMaxScalars] = {};
  size_t count = 0;
  absl::Span<const float> span() const { return {values, count}; }
};

struct Optimizer {
  const char* name;  // as ConfigureOptimizer names it
  absl::Span<const HyperParameter> hyper_parameters;
  absl::Span<const StateSpec> states;
  size_t scalar_count;  // as StepScalars::count

  // InvalidArgument names the first value out of range and its limit, or the count if not one per
  // hyper-parameter.
  absl::Status Validate(absl::Span<const double> values) const;
  // `values` must be valid. applied_count: updates this tensor has had before this one.
  StepScalars Prepare(absl::Span<const double> values, int64_t applied_count,
                      float gradient_scale) const;
  // False: this step neither reads nor writes the states (SGD without momentum).
  bool KeepsState(absl::Span<const float> scalars) const { return keeps_state(scalars.data()); }

  absl::Status (*validate)(const double* values);
  void (*prepare)(const double* values, double t, float* scalars);
  bool (*keeps_state)(const float* scalars);

  // What comes as the gradient are new weights, which are neither clipped nor scaled, and for which
  // there are no zeros where one is absent.
  bool takes_weights;

  // Scalars that only the owner of the tensor can know. They are made of IEEE operations alone, so
  // that every machine finds the same bits. No effect for kElement.
  Scope scope;
  void (*begin)(const MatrixShape& shape, float* scalars);  // before anything is measured
  // After: the sums of squares of the two vectors that Measure looks at.
  void (*complete)(const double* sum_squares, const MatrixShape& shape, float* scalars);
  FactorAverage (*averaging)(const float* scalars);  // kFactored; else null
  NewtonSchulz (*iteration)(const float* scalars);   // kMatrix; else null
};

// The optimizer of a name; null if there is none. All names, for messages.
const Optimizer* FindOptimizer(absl::string_view name);
std::string OptimizerNames();

// ---- What the step leader computes beside the scalars, once, in double ----

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

// ---- What every owner of a shard runs ----

enum class StateFormat : uint8_t { kFp32, k8Bit, k4Bit };

// How the fp32 master is kept beside the bf16 weight.
enum class MasterFormat : uint8_t {
  kExact,     // int16 remainder: casts.h
  k24Bit,     // int8 remainder: bits32 = (weight << 16) + (remainder << 8), rounded stochastically
  kBF16Only,  // no remainder: the weight alone, rounded stochastically
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

// One further number per element that a rule reads: of kMatrix, and of kFactored from two
// dimensions. Element i of a range is `values[i]`, or, where that is null, the product of the
// factors of its row and of its column.
struct ElementInput {
  const float* values = nullptr;
  const float* row_factors = nullptr;     // [matrices * rows]
  const float* column_factors = nullptr;  // [matrices * columns]
  MatrixShape shape;
  uint64_t begin = 0;  // of the flattened tensor, the range's first element
  bool exists() const { return values != nullptr || row_factors != nullptr; }
};

// One step of one range. A range starts on a block boundary of its tensor and holds whole blocks,
// except a tensor's last. Arrays are contiguous, aligned to their elements, and do not overlap, but
// for new_weight, which may be the very array of weight.
struct RangeStep {
  const Optimizer* optimizer = nullptr;
  absl::Span<const float> scalars;  // of Optimizer::Prepare
  TypedSpan gradient;               // the raw sum, at any alignment
  const uint16_t* weight = nullptr;
  uint16_t* new_weight = nullptr;  // another array: readers of the old version go on undisturbed
  void* remainder = nullptr;       // int16_t, int8_t or (kBF16Only) nothing; in place
  MasterFormat master = MasterFormat::kExact;
  StateFormat format = StateFormat::kFp32;
  Rounding rounding = Rounding::kNoZero;
  StateSpan states[kMaxStates];  // of the optimizer's states, in order
  ElementInput input;
  RandomKey random;          // of the tensor and step; read by stochastic rounding alone
  uint64_t first_block = 0;  // of the tensor's blocks, the range's first
};

// The step of elements begin .. begin + count of a range, or as many of them as there are. `begin`
// is on a block boundary.
RangeStep PartOf(const RangeStep& step, size_t begin, size_t count);

// InvalidArgument (an unknown optimizer, a null, misaligned or overlapping array, scalars of
// another count, none of them a number): then nothing was written.
absl::Status Step(const RangeStep& step);

}  // namespace orlop::kernels
