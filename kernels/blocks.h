// The operations of a fused step on one 256-element block. Every instruction set has a table of
// them: reference_blocks.cc for the scalar reference, blocks.cc and optimizer_unit-inl.h for
// Highway's targets. step.cc calls them in order. All arrays are whole blocks at any alignment.
// None overlap, except that `split` may write the weight that `join` read.
#pragma once
#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/optimizer.h"
#include "kernels/whole_tensor.h"

namespace orlop::kernels {

struct BlockKernels {
  // Converts 256 elements to fp32.
  void (*widen)(DType dtype, const void* from, float* to);
  // Computes the fp32 master from weight and remainder (null for kBF16Only), and the reverse.
  void (*join)(MasterFormat format, const uint16_t* weight, const void* remainder, float* master);
  void (*split)(MasterFormat format, const float* master, BlockRandom random, uint16_t* weight,
                void* remainder);
  // Decodes and encodes k8Bit and k4Bit states; a block has one or two absmax values.
  void (*decode)(StateFormat format, CodeBook code_book, StateSpan from, float* to);
  void (*encode)(StateFormat format, CodeBook code_book, Rounding rounding, const float* from,
                 BlockRandom random, StateSpan to);
  // ReduceGradient of reduce.h on at most one block.
  void (*reduce)(TypedSpan gradient, BlockSums* sums);
  // Encodes a k8Bit block whose largest magnitude has these bits (FusedRange). Null: not available
  // here.
  void (*encode_found)(CodeBook code_book, Rounding rounding, const float* from,
                       uint32_t largest_bits, BlockRandom random, StateSpan to);
};

// Returns the kernels of the instruction set in use.
const BlockKernels& ActiveBlockKernels();
namespace reference {
extern const BlockKernels kBlockKernels;
}

// Applies one optimizer's rule to 256 elements in place: the raw gradient, the master, the states
// and, after them, the input, all in fp32. A null array counts as zeros and is not written.
// `scalars`: see StepScalars.
using BlockUpdate = void (*)(const float* scalars, const float* gradient, float* master,
                             float* const* states);

// Computes the vectors that an optimizer of larger scope than an element measures. Writes only
// out[0] and out[1].
using BlockMeasure = void (*)(const float* scalars, const float* gradient, const float* master,
                              float* const* states, float* const* out);
inline constexpr size_t kMeasures = 2;

// The whole step for many blocks, with 8-bit state and the exact master (fused-inl.h). Fields are
// as in RangeStep.
struct FusedRange {
  const void* gradient;
  DType dtype;  // kBF16 or kF32
  const uint16_t* weight;
  uint16_t* new_weight;
  int16_t* remainder;
  const StateSpan* states;
  const Rounding* rounding;  // one per state
  RandomKey random;
  uint64_t first_block;
  // Number of 256-element blocks.
  size_t blocks;
  // Encodes blocks whose rounding is not plain kNoZero.
  decltype(BlockKernels::encode_found) encode;
};
using FusedUpdate = void (*)(const float* scalars, const FusedRange& range);

// The functions that an optimizer's file compiles to.
struct Updates {
  BlockUpdate update;
  FusedUpdate fused;     // null: not available for this instruction set
  BlockMeasure measure;  // null for Scope::kElement
};
struct OptimizerUnit {
  Optimizer optimizer;
  Updates reference;
  Updates (*active)();  // those of the instruction set in use
};
absl::Span<const OptimizerUnit> OptimizerUnits();

// Returns the errors of Step; a range of no elements is valid. `measures`: check for Measure
// instead, which does not need a matrix's input.
absl::Status CheckStep(const RangeStep& step, bool measures = false);

// Returns how a state of a step is rounded. kNoZero becomes kStochastic for states that nearest
// rounding would freeze: slow averages, and every k4Bit state.
Rounding RoundingOf(const RangeStep& step, size_t state);

// Returns the unit of a step's optimizer. Status: InvalidArgument if there is none, or if the
// scalars are not the optimizer's.
absl::StatusOr<const OptimizerUnit*> UnitOf(const RangeStep& step);

// Sizes of the arrays of `count` elements.
size_t ValueBytes(StateFormat format, size_t count);
size_t ScaleCount(StateFormat format, size_t count);  // number of absmax values
size_t RemainderBytes(MasterFormat format, size_t count);

// Step and Measure with the given kernels. Inputs are not checked.
void StepBlocks(const RangeStep& step, const BlockKernels& kernels, const Updates& updates);
void MeasureBlocks(const RangeStep& step, const BlockKernels& kernels, const Updates& updates,
                   Measured* measured, float* first);

}  // namespace orlop::kernels
