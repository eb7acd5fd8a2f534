// Many ranges in one launch: computes which range, and which elements of it, a CUDA thread block
// steps. Uses no CUDA, so the tests run it on the host.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/optimizer.h"

namespace orlop::kernels::cuda {

// One range of one tensor (optimizer.h, RangeStep) in the form a kernel reads: plain, with device
// pointers.
struct RangeDescriptor {
  const void* gradient;
  const uint16_t* weight;
  uint16_t* new_weight;
  void* remainder;
  void* values[kMaxStates];
  float* absmax[kMaxStates];
  ElementInput input;
  RandomKey random;
  uint64_t first_block;  // index in the tensor of the range's first block
  uint64_t count;        // elements, at least 1
  DType dtype;
  MasterFormat master;
  StateFormat format;
  bool keeps_state;
  Rounding rounding[kMaxStates];
  float scalars[kMaxScalars];
};

// Ranges of one optimizer. A batch is a kernel parameter, so a launch needs no memory or copy of
// its own and can be captured in a graph. Kernel parameters are limited to 32,764 bytes.
inline constexpr uint32_t kRangesPerBatch = 120;
struct Batch {
  uint32_t range_count;
  // Index in the batch of each range's first block; the last entry is the number of blocks.
  uint64_t first_block[kRangesPerBatch + 1];
  RangeDescriptor ranges[kRangesPerBatch];
};
static_assert(sizeof(Batch) + sizeof(uint64_t) <= 32764);

// Returns element i of a range's input, as FillInput in step.cc does; 0 if the range has none.
ORLOP_DEVICE inline float InputOf(const ElementInput& input, uint64_t i) {
  if (input.values != nullptr) return input.values[i];
  if (input.row_factors == nullptr) return 0;
  const uint64_t element = input.begin + i, row = element / input.shape.columns;
  const uint64_t column =
      row / input.shape.rows * input.shape.columns + element % input.shape.columns;
  return input.row_factors[row] * input.column_factors[column];
}

// Blocks of a batch that one launch steps. CUDA limits a grid to 2^31 - 1.
inline constexpr uint64_t kLargestGrid = 0x7FFFFFFF;
struct Grid {
  uint64_t first_block;
  uint32_t block_count;  // 0: no more
};
inline Grid NextGrid(uint64_t first_block, uint64_t block_count) {
  const uint64_t left = block_count - first_block;
  return {first_block, static_cast<uint32_t>(left < kLargestGrid ? left : kLargestGrid)};
}

// Finds the last range that begins at or before `block` by binary search. `block` must be less than
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

// A block within its range. Offsets have 64 bits, because a range may have more than 2^31 elements.
struct BlockPlace {
  uint64_t block;  // index in the range
  uint64_t begin;  // index in the range of its first element
  uint32_t count;  // number of its elements: 256, or fewer at the end
};
ORLOP_DEVICE inline BlockPlace PlaceOf(uint64_t block, uint64_t count) {
  const uint64_t begin = block * kQuantBlock, left = count - begin;
  return {block, begin, static_cast<uint32_t>(left < kQuantBlock ? left : kQuantBlock)};
}

}  // namespace orlop::kernels::cuda
