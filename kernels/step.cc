// One push, 8 of 8 (ARCHITECTURE.md): a range of a shard, one 256-element block after another.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "kernels/blocks.h"
#include "kernels/optimizer.h"
#include "kernels/reference.h"

namespace orlop::kernels {
namespace {

size_t ValueBytes(StateFormat format, size_t count) {
  switch (format) {
    case StateFormat::kFp32:
      return 4 * count;
    case StateFormat::k8Bit:
      return count;
    case StateFormat::k4Bit:
      return (count + 1) / 2;
  }
  return 0;
}
size_t ScaleCount(StateFormat format, size_t count) {
  return format == StateFormat::kFp32   ? 0
         : format == StateFormat::k8Bit ? BlockCount(count)
                                        : FourBitBlockCount(count);
}
size_t RemainderBytes(MasterFormat format, size_t count) {
  return format == MasterFormat::kExact ? 2 * count : format == MasterFormat::k24Bit ? count : 0;
}

// Every byte of a fresh state.
uint8_t ZeroByte(StateFormat format, CodeBook code_book) {
  if (format == StateFormat::kFp32 || code_book == CodeBook::kUnsigned) return 0;
  return format == StateFormat::k8Bit ? kSignedZeroCode : kSigned4ZeroCode * 0x11;
}

// The bytes of one block.
struct Block {
  const char* gradient;
  const uint16_t* weight;
  uint16_t* new_weight;
  char* remainder;
  StateSpan states[kMaxStates];
};

// `count` elements further in an array; one that is not there stays so.
template <class T>
T* At(T* array, size_t count) {
  return array == nullptr ? nullptr : array + count;
}

void Copy(void* to, const void* from, size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);  // nothing may be copied from null
}

Block BlockAt(const RangeStep& step, size_t states, size_t begin) {
  Block block;
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

// A short block on padded copies: zeros, and the codes of zero.
class PaddedBlock {
 public:
  PaddedBlock(const RangeStep& step, const Block& from, size_t states, size_t count)
      : step_(step), from_(from), states_(states), count_(count), block_(from) {
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

// What all blocks of a step share.
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
  bool IsFused() const {
    return updates.fused != nullptr && states > 0 && step.format == StateFormat::k8Bit &&
           step.master == MasterFormat::kExact && step.gradient.dtype != DType::kF16;
  }

  void RunFused(const Block& block, uint64_t index) const {
    alignas(64) float values[kMaxStates][kQuantBlock];
    FusedBlock fused{block.gradient,
                     step.gradient.dtype,
                     block.weight,
                     block.new_weight,
                     reinterpret_cast<int16_t*>(block.remainder),
                     block.states,
                     {values[0], values[1], values[2]},
                     {}};
    updates.fused(step.scalars.data(), &fused);
    for (size_t i = 0; i < states; ++i) {
      kernels.encode_found(BookOf(i), rounding[i], values[i], fused.largest_bits[i],
                           RandomOf(index, i), block.states[i]);
    }
  }

  void Run(const Block& block, uint64_t index) const {
    if (IsFused()) return RunFused(block, index);
    alignas(64) float gradient[kQuantBlock], master[kQuantBlock], decoded[kMaxStates][kQuantBlock];
    float* values[kMaxStates] = {};
    kernels.widen(step.gradient.dtype, block.gradient, gradient);
    kernels.join(step.master, block.weight, block.remainder, master);
    for (size_t i = 0; i < states; ++i) {
      if (step.format == StateFormat::kFp32) {
        values[i] = static_cast<float*>(block.states[i].values);
        continue;
      }
      values[i] = decoded[i];
      kernels.decode(step.format, BookOf(i), block.states[i], values[i]);
    }
    updates.update(step.scalars.data(), gradient, master, values);
    kernels.split(step.master, master, RandomOf(index, kMasterUse), block.new_weight,
                  block.remainder);
    if (step.format == StateFormat::kFp32) return;
    for (size_t i = 0; i < states; ++i) {
      kernels.encode(step.format, BookOf(i), rounding[i], values[i], RandomOf(index, i),
                     block.states[i]);
    }
  }
};

}  // namespace

Rounding RoundingOf(const RangeStep& step, size_t state) {
  const auto frozen = static_cast<uint32_t>(step.scalars[1]);
  const bool stochastic = step.rounding == Rounding::kNoZero && (frozen >> state & 1) != 0;
  return stochastic ? Rounding::kStochastic : step.rounding;
}

void StepBlocks(const RangeStep& step, const BlockKernels& kernels, const Updates& updates) {
  const Optimizer& optimizer = *step.optimizer;
  Pass pass{step, kernels, updates,
            optimizer.KeepsState(step.scalars) ? optimizer.states.size() : 0};
  for (size_t i = 0; i < pass.states; ++i) pass.rounding[i] = RoundingOf(step, i);
  const size_t tail = step.gradient.count % kQuantBlock;
  const size_t whole = step.gradient.count - tail;
  for (size_t begin = 0; begin < whole; begin += kQuantBlock) {
    pass.Run(BlockAt(step, pass.states, begin), step.first_block + begin / kQuantBlock);
  }
  if (tail == 0) return;
  PaddedBlock padded(step, BlockAt(step, pass.states, whole), pass.states, tail);
  pass.Run(padded.block(), step.first_block + whole / kQuantBlock);
  padded.CopyBack();
}

namespace {

struct Array {
  const char* name;
  const void* begin;
  size_t bytes;
  size_t alignment;
};

absl::Status Refuse(const Array& array, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(array.name, " ", what));
}

// Every array present, aligned, and apart from the others.
absl::Status CheckArrays(const RangeStep& step) {
  const size_t count = step.gradient.count;
  Array arrays[4 + 2 * kMaxStates];
  size_t n = 0;
  arrays[n++] = {"gradient", step.gradient.data, count * SizeOf(step.gradient.dtype), 1};
  arrays[n++] = {"weight", step.weight, 2 * count, 2};
  if (step.new_weight != step.weight) arrays[n++] = {"new_weight", step.new_weight, 2 * count, 2};
  if (const size_t bytes = RemainderBytes(step.master, count); bytes > 0)
    arrays[n++] = {"remainder", step.remainder, bytes, bytes / count};
  if (step.optimizer->KeepsState(step.scalars)) {
    for (size_t i = 0; i < step.optimizer->states.size(); ++i) {
      const bool fp32 = step.format == StateFormat::kFp32;
      arrays[n++] = {step.optimizer->states[i].name, step.states[i].values,
                     ValueBytes(step.format, count), fp32 ? size_t{4} : size_t{1}};
      if (!fp32)
        arrays[n++] = {"absmax", step.states[i].absmax, 4 * ScaleCount(step.format, count), 4};
    }
  }
  for (size_t i = 0; i < n; ++i) {
    const auto begin = reinterpret_cast<uintptr_t>(arrays[i].begin);
    if (begin == 0) return Refuse(arrays[i], "is missing");
    if (begin % arrays[i].alignment != 0)
      return Refuse(arrays[i], absl::StrCat("is not aligned to ", arrays[i].alignment, " bytes"));
    for (size_t j = 0; j < i; ++j) {
      const auto other = reinterpret_cast<uintptr_t>(arrays[j].begin);
      if (begin < other + arrays[j].bytes && other < begin + arrays[i].bytes)
        return Refuse(arrays[i], absl::StrCat("overlaps ", arrays[j].name));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<const OptimizerUnit*> UnitOf(const RangeStep& step) {
  for (const OptimizerUnit& unit : OptimizerUnits()) {
    if (&unit.optimizer != step.optimizer) continue;
    if (step.scalars.size() != unit.optimizer.scalar_count)
      return absl::InvalidArgumentError(absl::StrCat("optimizer ", unit.optimizer.name, " takes ",
                                                     unit.optimizer.scalar_count, " scalars, not ",
                                                     step.scalars.size()));
    for (const float scalar : step.scalars) {
      if (!std::isfinite(scalar))
        return absl::InvalidArgumentError(
            absl::StrCat("a scalar of ", unit.optimizer.name, " is ", scalar));
    }
    return &unit;
  }
  return absl::InvalidArgumentError("an unknown optimizer");
}

}  // namespace

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
  part.first_block = step.first_block + begin / kQuantBlock;
  return part;
}

absl::Status CheckStep(const RangeStep& step) {
  if (absl::Status status = UnitOf(step).status(); !status.ok()) return status;
  return step.gradient.count == 0 ? absl::OkStatus() : CheckArrays(step);
}

absl::Status Step(const RangeStep& step) {
  if (absl::Status status = CheckStep(step); !status.ok()) return status;
  if (step.gradient.count == 0) return absl::OkStatus();
  const absl::StatusOr<const OptimizerUnit*> unit = UnitOf(step);
  StepBlocks(step, ActiveBlockKernels(), (*unit)->active());
  return absl::OkStatus();
}

void reference::Step(const RangeStep& step) {
  for (const OptimizerUnit& unit : OptimizerUnits()) {
    if (&unit.optimizer == step.optimizer)
      StepBlocks(step, reference::kBlockKernels, unit.reference);
  }
}

}  // namespace orlop::kernels
