// One push, 8 of 8 (ARCHITECTURE.md): a range of a shard, one 256-element block after another.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/blocks.h"
#include "kernels/code_books.h"
#include "kernels/optimizer.h"
#include "kernels/quantize.h"
#include "kernels/random.h"
#include "kernels/reference.h"
#include "kernels/types.h"
#include "kernels/whole_tensor.h"

namespace orlop::kernels {
namespace {

// Returns the value of every byte of a state that is all zeros.
uint8_t ZeroByte(StateFormat format, CodeBook code_book) {
  if (format == StateFormat::kFp32 || code_book == CodeBook::kUnsigned) return 0;
  return format == StateFormat::k8Bit ? kSignedZeroCode : kSigned4ZeroCode * 0x11;
}

// Pointers to the arrays of one block.
struct Block {
  const char* gradient;
  const uint16_t* weight;
  uint16_t* new_weight;
  char* remainder;
  StateSpan states[kMaxStates];
  size_t begin;  // index in the range
  size_t count;  // elements present; zeros follow them
};

// Returns a pointer `count` elements further in an array; null stays null.
template <class T>
T* At(T* array, size_t count) {
  return array == nullptr ? nullptr : array + count;
}

void Copy(void* to, const void* from, size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);  // memcpy must not get null
}

Block BlockAt(const RangeStep& step, size_t states, size_t begin, size_t count = kQuantBlock) {
  Block block;
  block.begin = begin;
  block.count = count;
  block.gradient =
      static_cast<const char*>(step.gradient.data) + begin * SizeOf(step.gradient.dtype);
  block.weight = step.weight + begin;
  block.new_weight = step.new_weight + begin;
  block.remainder = At(static_cast<char*>(step.remainder), RemainderBytes(step.master, begin));
  for (size_t i = 0; i < states; ++i) {
    block.states[i] = {
        At(static_cast<char*>(step.states[i].values), ValueBytes(step.format, begin)),
        At(step.states[i].absmax, ScaleCount(step.format, begin))};
  }
  return block;
}

// Computes the input of a block.
void FillInput(const ElementInput& input, const Block& block, float* to) {
  std::fill(to + block.count, to + kQuantBlock, 0.0f);
  if (input.values != nullptr) return Copy(to, input.values + block.begin, 4 * block.count);
  const MatrixShape& shape = input.shape;
  for (size_t i = 0; i < block.count;) {
    const uint64_t element = input.begin + block.begin + i, row = element / shape.columns;
    const uint64_t column = element % shape.columns;
    const size_t run = std::min<uint64_t>(block.count - i, shape.columns - column);
    const float* columns = input.column_factors + row / shape.rows * shape.columns + column;
    for (size_t j = 0; j < run; ++j) to[i + j] = input.row_factors[row] * columns[j];
    i += run;
  }
}

// A short block, padded by copying: zeros, and the codes of zero.
class PaddedBlock {
 public:
  PaddedBlock(const RangeStep& step, const Block& from, size_t states)
      : step_(step), from_(from), states_(states), count_(from.count), block_(from) {
    const size_t count = count_;
    Copy(gradient_, from.gradient, count * SizeOf(step.gradient.dtype));
    Copy(weight_, from.weight, 2 * count);
    Copy(remainder_, from.remainder, RemainderBytes(step.master, count));
    block_.gradient = gradient_;
    block_.weight = block_.new_weight = weight_;
    block_.remainder = remainder_;
    for (size_t i = 0; i < states; ++i) {
      const CodeBook book = step.optimizer->states[i].code_book;
      std::memset(values_[i], ZeroByte(step.format, book), sizeof(values_[i]));
      Copy(values_[i], from.states[i].values, ValueBytes(step.format, count));
      const size_t scales = ScaleCount(step.format, count);
      Copy(absmax_[i], from.states[i].absmax, scales * sizeof(float));
      if (step.format == StateFormat::k4Bit && count % 2 == 1) {
        auto* last = reinterpret_cast<uint8_t*>(values_[i]) + count / 2;
        *last = static_cast<uint8_t>((*last & 0x0F) | (ZeroByte(step.format, book) & 0xF0));
      }
      block_.states[i] = {values_[i], absmax_[i]};
    }
  }
  const Block& block() const { return block_; }
  void CopyBack() {
    Copy(from_.new_weight, weight_, 2 * count_);
    Copy(from_.remainder, remainder_, RemainderBytes(step_.master, count_));
    for (size_t i = 0; i < states_; ++i) {
      Copy(from_.states[i].values, values_[i], ValueBytes(step_.format, count_));
      Copy(from_.states[i].absmax, absmax_[i], ScaleCount(step_.format, count_) * sizeof(float));
    }
  }

 private:
  const RangeStep& step_;
  const Block from_;
  const size_t states_, count_;
  Block block_;
  alignas(64) char gradient_[4 * kQuantBlock] = {};
  alignas(64) uint16_t weight_[kQuantBlock] = {};
  alignas(64) char remainder_[2 * kQuantBlock] = {};
  alignas(64) char values_[kMaxStates][4 * kQuantBlock];
  float absmax_[kMaxStates][2] = {};
};

// The values that all blocks of a step share.
struct Pass {
  const RangeStep& step;
  const BlockKernels& kernels;
  const Updates& updates;
  size_t states;
  Rounding rounding[kMaxStates];

  CodeBook BookOf(size_t i) const { return step.optimizer->states[i].code_book; }
  BlockRandom RandomOf(uint64_t index, size_t i) const {
    return BlockRandomOf(step.random, index, static_cast<uint32_t>(i));
  }
  // The values that a rule reads for a block, in fp32.
  struct Loaded {
    alignas(64) float gradient[kQuantBlock], master[kQuantBlock];
    alignas(64) float decoded[kMaxStates + 1][kQuantBlock];
    float* values[kMaxStates + 1] = {};  // the states, then the input
  };
  void Load(const Block& block, Loaded* to) const {
    kernels.widen(step.gradient.dtype, block.gradient, to->gradient);
    kernels.join(step.master, block.weight, block.remainder, to->master);
    for (size_t i = 0; i < states; ++i) {
      if (step.format == StateFormat::kFp32) {
        to->values[i] = static_cast<float*>(block.states[i].values);
        continue;
      }
      to->values[i] = to->decoded[i];
      kernels.decode(step.format, BookOf(i), block.states[i], to->values[i]);
    }
    if (!step.input.exists()) return;
    const size_t input = step.optimizer->states.size();
    to->values[input] = to->decoded[input];
    FillInput(step.input, block, to->values[input]);
  }

  bool IsFused() const {
    return updates.fused != nullptr && states > 0 && step.format == StateFormat::k8Bit &&
           step.master == MasterFormat::kExact && step.gradient.dtype != DType::kF16;
  }

  // Steps whole blocks from `first` on.
  void RunFused(const Block& first, uint64_t index, size_t blocks) const {
    updates.fused(step.scalars.data(),
                  {first.gradient, step.gradient.dtype, first.weight, first.new_weight,
                   reinterpret_cast<int16_t*>(first.remainder), first.states, rounding, step.random,
                   index, blocks, kernels.encode_found});
  }

  void Run(const Block& block, uint64_t index) const {
    if (IsFused()) return RunFused(block, index, 1);
    Loaded loaded;
    Load(block, &loaded);
    updates.update(step.scalars.data(), loaded.gradient, loaded.master, loaded.values);
    kernels.split(step.master, loaded.master, RandomOf(index, kMasterUse), block.new_weight,
                  block.remainder);
    if (step.format == StateFormat::kFp32) return;
    for (size_t i = 0; i < states; ++i) {
      kernels.encode(step.format, BookOf(i), rounding[i], loaded.values[i], RandomOf(index, i),
                     block.states[i]);
    }
  }

  void Measure(const Block& block, Measured* measured, float* first) const {
    Loaded loaded;
    alignas(64) float out[kMeasures][kQuantBlock];
    float* const outs[kMeasures] = {out[0], out[1]};
    Load(block, &loaded);
    updates.measure(step.scalars.data(), loaded.gradient, loaded.master, loaded.values, outs);
    for (size_t m = 0; m < kMeasures; ++m)
      kernels.reduce({DType::kF32, out[m], block.count}, &measured->sums[m]);
    if (first != nullptr) Copy(first + block.begin, out[0], 4 * block.count);
  }
};

// Returns the pass of a step, which is called for each of its blocks; the last one may be short.
Pass PassOf(const RangeStep& step, const BlockKernels& kernels, const Updates& updates) {
  const Optimizer& optimizer = *step.optimizer;
  Pass pass{
      step, kernels, updates, optimizer.KeepsState(step.scalars) ? optimizer.states.size() : 0, {}};
  for (size_t i = 0; i < pass.states; ++i) pass.rounding[i] = RoundingOf(step, i);
  return pass;
}

}  // namespace

Rounding RoundingOf(const RangeStep& step, size_t state) {
  const auto frozen = static_cast<uint32_t>(step.scalars[1]);
  const bool freezes = (frozen >> state & 1) != 0 || step.format == StateFormat::k4Bit;
  return step.rounding == Rounding::kNoZero && freezes ? Rounding::kStochastic : step.rounding;
}

void StepBlocks(const RangeStep& step, const BlockKernels& kernels, const Updates& updates) {
  const Pass pass = PassOf(step, kernels, updates);
  const size_t tail = step.gradient.count % kQuantBlock;
  const size_t whole = step.gradient.count - tail;
  const size_t fused = pass.IsFused() ? whole : 0;
  if (fused > 0)
    pass.RunFused(BlockAt(step, pass.states, 0), step.first_block, fused / kQuantBlock);
  for (size_t begin = fused; begin < whole; begin += kQuantBlock) {
    pass.Run(BlockAt(step, pass.states, begin), step.first_block + begin / kQuantBlock);
  }
  if (tail == 0) return;
  PaddedBlock padded(step, BlockAt(step, pass.states, whole, tail), pass.states);
  pass.Run(padded.block(), step.first_block + whole / kQuantBlock);
  padded.CopyBack();
}

void MeasureBlocks(const RangeStep& step, const BlockKernels& kernels, const Updates& updates,
                   Measured* measured, float* first) {
  const Pass pass = PassOf(step, kernels, updates);
  const size_t tail = step.gradient.count % kQuantBlock;
  const size_t whole = step.gradient.count - tail;
  for (size_t begin = 0; begin < whole; begin += kQuantBlock) {
    pass.Measure(BlockAt(step, pass.states, begin), measured, first);
  }
  if (tail == 0) return;
  const PaddedBlock padded(step, BlockAt(step, pass.states, whole, tail), pass.states);
  pass.Measure(padded.block(), measured, first);
}

RangeStep PartOf(const RangeStep& step, size_t begin, size_t count) {
  RangeStep part = step;
  const Block at = BlockAt(step, step.optimizer->states.size(), begin);
  part.gradient = Slice(step.gradient, begin, count);
  part.weight = at.weight;
  part.new_weight = at.new_weight;
  if (step.remainder != nullptr) part.remainder = at.remainder;
  for (size_t i = 0; i < step.optimizer->states.size(); ++i) {
    if (step.states[i].values != nullptr) part.states[i] = at.states[i];
  }
  part.input.values = At(step.input.values, begin);
  part.input.begin = step.input.begin + begin;
  part.first_block = step.first_block + begin / kQuantBlock;
  return part;
}

absl::Status Step(const RangeStep& step) {
  if (absl::Status status = CheckStep(step); !status.ok()) return status;
  if (step.gradient.count == 0) return absl::OkStatus();
  const absl::StatusOr<const OptimizerUnit*> unit = UnitOf(step);
  StepBlocks(step, ActiveBlockKernels(), (*unit)->active());
  return absl::OkStatus();
}

absl::Status Measure(const RangeStep& step, Measured* measured, float* first) {
  if (absl::Status status = CheckStep(step, /*measures=*/true); !status.ok()) return status;
  const Updates updates = (*UnitOf(step))->active();
  if (updates.measure != nullptr)
    MeasureBlocks(step, ActiveBlockKernels(), updates, measured, first);
  return absl::OkStatus();
}

void reference::Step(const RangeStep& step) {
  StepBlocks(step, reference::kBlockKernels, (*UnitOf(step))->reference);
}
void reference::Measure(const RangeStep& step, Measured* measured, float* first) {
  const Updates& updates = (*UnitOf(step))->reference;
  if (updates.measure != nullptr)
    MeasureBlocks(step, reference::kBlockKernels, updates, measured, first);
}

}  // namespace orlop::kernels
