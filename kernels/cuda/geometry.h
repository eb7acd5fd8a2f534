// Many ranges in one launch: which range, and which elements of it, a CUDA thread block steps. No
// CUDA in here: the tests run it on the host.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/optimizer.h"

namespace orlop::kernels::cuda {

// One range of one tensor (optimizer.h, RangeStep) as a kernel reads it: plain, of device pointers.
struct RangeDescriptor {
  const void* gradient;
  const uint16_t* weight;
  uint16_t* new_weight;
  void* remainder;
  void* values[kMaxStates];
  float* absmax[kMaxStates];
  ElementInput input;
  RandomKey random;
  uint64_t first_block;  // of the tensor's blocks, the range's first
  uint64_t count;        // elements, at least 1
  DType dtype;
  MasterFormat master;
  StateFormat format;
  bool keeps_state;
  Rounding rounding[kMaxStates];
  float scalars[kMaxScalars];
};

// Ranges of one optimizer. It is a kernel parameter, so that a launch needs neither memory nor a
// copy of its own and may be captured in a graph; parameters end at 32,764 bytes.
inline constexpr uint32_t kRangesPerBatch = 120;
struct Batch {
  uint32_t range_count;
  uint64_t first_block[kRangesPerBatch + 1];  // of the batch's blocks, each range's first; then all
  RangeDescriptor ranges[kRangesPerBatch];
};
static_assert(sizeof(Batch) + sizeof(uint64_t) <= 32764);

// Element i of a range's input: step.cc's FillInput. 0: it has none.
ORLOP_DEVICE inline float InputOf(const ElementInput& input, uint64_t i) {
  if (input.values != nullptr) return input.values[i];
  if (input.row_factors == nullptr) return 0;
  const uint64_t element = input.begin + i, row = element / input.shape.columns;
  const uint64_t column =
      row / input.shape.rows * input.shape.columns + element % input.shape.columns;
  return input.row_factors[row] * input.column_factors[column];
}

// Blocks of a batch that one launch steps: CUDA's grids end at 2^31 - 1.
inline constexpr uint64_t kLargestGrid = 0x7FFFFFFF;
struct Grid {
  uint64_t first_block;
  uint32_t block_count;  // 0: no more
};
inline Grid NextGrid(uint64_t first_block, uint64_t block_count) {
  const uint64_t left = block_count - first_block;
  return {first_block, static_cast<uint32_t>(left < kLargestGrid ? left : kLargestGrid)};
}

// The last range that begins at or before `block`: a binary search. block <
// first_block[range_count].
ORLOP_DEVICE inline uint32_t FindRange(const uint64_t* first_block, uint32_t range_count,
                                       uint64_t block) {
  uint32_t low = 0, high = range_count;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// A block within its range. All offsets are 64 bits: a range may hold more than 2^31 elements.
struct BlockPlace {
  uint64_t block;  // of the range's blocks
  uint64_t begin;  // its first element
  uint32_t count;  // its elements: 256, or fewer at the end
};
ORLOP_DEVICE inline BlockPlace PlaceOf(uint64_t block, uint64_t count) {
  const uint64_t begin = block * kQuantBlock, left = count - begin;
  return {block, begin, static_cast<uint32_t>(left < kQuantBlock ? left : kQuantBlock)};
}

}  // namespace orlop::kernels::cuda
