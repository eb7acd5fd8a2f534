// What a fused step does to one 256-element block, each piece for every instruction set: the table
// of the reference (reference_blocks.cc) and those of Highway's targets (blocks.cc,
// optimizer_unit-inl.h). step.cc strings them together. All arrays are whole blocks at any
// alignment; none overlap, but for the weight of Split, which may be that of Join.
#pragma once
#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/optimizer.h"
#include "kernels/whole_tensor.h"

namespace orlop::kernels {

struct BlockKernels {
  // 256 elements as fp32.
  void (*widen)(DType dtype, const void* from, float* to);
  // The fp32 master from weight and remainder (of kBF16Only: null), and back.
  void (*join)(MasterFormat format, const uint16_t* weight, const void* remainder, float* master);
  void (*split)(MasterFormat format, const float* master, BlockRandom random, uint16_t* weight,
                void* remainder);
  // k8Bit and k4Bit states; absmax: one or two values.
  void (*decode)(StateFormat format, CodeBook code_book, StateSpan from, float* to);
  void (*encode)(StateFormat format, CodeBook code_book, Rounding rounding, const float* from,
                 BlockRandom random, StateSpan to);
  // reduce.h's ReduceGradient, of at most a block.
  void (*reduce)(TypedSpan gradient, BlockSums* sums);
  // k8Bit, given the largest bits of magnitudes (FusedRange); null: not fused here.
  void (*encode_found)(CodeBook code_book, Rounding rounding, const float* from,
                       uint32_t largest_bits, BlockRandom random, StateSpan to);
};

// Kernels of the instruction set in use, and of the reference.
const BlockKernels& ActiveBlockKernels();
namespace reference {
extern const BlockKernels kBlockKernels;
}

// One optimizer's rule over 256 elements, in place: the raw gradient, the master, the states and,
// after them, the input in fp32; null: zeros, which are not written. `scalars` as StepScalars.
using BlockUpdate = void (*)(const float* scalars, const float* gradient, float* master,
                             float* const* states);

// What it looks at first, where its scope is more than the element; writes nothing but out[0] and
// out[1].
using BlockMeasure = void (*)(const float* scalars, const float* gradient, const float* master,
                              float* const* states, float* const* out);
inline constexpr size_t kMeasures = 2;

// The same over whole blocks, one after another, with everything around it, for 8-bit state and the
// exact master (fused-inl.h). Fields as RangeStep's of these names.
struct FusedRange {
  const void* gradient;
  DType dtype;  // kBF16 or kF32
  const uint16_t* weight;
  uint16_t* new_weight;
  int16_t* remainder;
  const StateSpan* states;
  const Rounding* rounding;  // of each state
  RandomKey random;
  uint64_t first_block;
  size_t blocks;                                // 256 elements each
  decltype(BlockKernels::encode_found) encode;  // what is not plain kNoZero
};
using FusedUpdate = void (*)(const float* scalars, const FusedRange& range);

// What an optimizer's file compiles to.
struct Updates {
  BlockUpdate update;
  FusedUpdate fused;     // null: none for this instruction set
  BlockMeasure measure;  // null: Scope::kElement
};
struct OptimizerUnit {
  Optimizer optimizer;
  Updates reference;
  Updates (*active)();  // of the instruction set in use
};
absl::Span<const OptimizerUnit> OptimizerUnits();

// What Step refuses; a range of no elements is fine. `measures`: of Measure, by which a matrix's
// input is made.
absl::Status CheckStep(const RangeStep& step, bool measures = false);

// How the states of a step are rounded: kNoZero becomes kStochastic for those that nearest rounding
// would freeze, slow averages and all of k4Bit.
Rounding RoundingOf(const RangeStep& step, size_t state);

// The unit of a step's optimizer. InvalidArgument: there is none, or the scalars are not its own.
absl::StatusOr<const OptimizerUnit*> UnitOf(const RangeStep& step);

// Bytes of an array of `count` elements.
size_t ValueBytes(StateFormat format, size_t count);
size_t ScaleCount(StateFormat format, size_t count);  // absmax values
size_t RemainderBytes(MasterFormat format, size_t count);

// Step and Measure with the given kernels; inputs are not checked.
void StepBlocks(const RangeStep& step, const BlockKernels& kernels, const Updates& updates);
void MeasureBlocks(const RangeStep& step, const BlockKernels& kernels, const Updates& updates,
                   Measured* measured, float* first);

}  // namespace orlop::kernels
