// Norms, the non-finite veto and sums of contributions, in an order that no chunk size, thread or
// instruction set can change.
//   Order     in a 256-block, lane l = 0..15 adds the squares of elements l, l + 16, l + 32, ... in
//             index order, in fp64 (the square of an fp32 is exact there); then lane l += lane
//             l + 8, + 4, + 2, + 1. Blocks are added one by one in index order to the running sum.
//   Hence     feeding a shard in consecutive pieces of whole blocks gives the bits of one call.
//             Shards are summed by the caller, in manifest order, each from its own zero.
//   Bad       a NaN or infinity is counted and adds nothing, so the sum is finite.
//   Threads   no shared state; disjoint ranges may run at once.
#pragma once
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/types.h"

namespace orlop::kernels {

struct BlockSums {
  double sum_squares = 0;
  uint64_t nonfinite_count = 0;
};

// Continues *sums over the blocks of `gradient`. A piece that is not the tensor's last must be a
// whole number of blocks, else the next piece starts in mid-block and the order is not kept.
void ReduceGradient(TypedSpan gradient, BlockSums* sums);

// Copies gradient.count elements to `destination` (any alignment, no overlap) and continues *sums,
// reading the source once: for pushes, whose bytes must be owned before they are trusted. The sum
// is of the bytes that were copied, even if the source changes meanwhile.
void CopyAndReduce(void* destination, TypedSpan gradient, BlockSums* sums);

// accumulator[i] += contribution[i], in fp32. Called in ascending rank; the first contribution is
// written by WidenToF32, since 0 + -0 is not -0. NaN results are canonical.
//   Status  InvalidArgument if counts differ; then nothing was written.
absl::Status AccumulateToF32(TypedSpan contribution, absl::Span<float> accumulator);

}  // namespace orlop::kernels
