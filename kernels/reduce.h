// Norms, the non-finite veto and sums of contributions, in an order that no chunk size, thread or
// instruction set can change.
//   Order     In a 256-block, lane l = 0..15 adds the squares of elements l, l + 16, l + 32, ... in
//             index order, in fp64 (the square of an fp32 is exact there). Then lane l adds lane l
//             + 8, then l + 4, l + 2 and l + 1. Blocks are added to the running sum one by one, in
//             index order.
//   Hence     Feeding a shard in consecutive pieces of whole blocks gives the bits of one call. The
//             caller adds the sums of shards, in manifest order, each started from zero.
//   Bad       A NaN or infinity is counted and not added, so the sum is finite.
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

// Continues *sums over the blocks of `gradient`. Unless it is the tensor's last piece, it must have
// a whole number of blocks; else the next piece would begin inside a block and change the order.
void ReduceGradient(TypedSpan gradient, BlockSums* sums);

// Copies gradient.count elements to `destination` (any alignment, no overlap) and continues *sums.
// Reads the source once: a push must own its bytes before it trusts them. The sum is of the copied
// bytes, even if the source changes meanwhile.
void CopyAndReduce(void* destination, TypedSpan gradient, BlockSums* sums);

// accumulator[i] += contribution[i], in fp32. Call in ascending order of rank. Write the first
// contribution by WidenToF32, because 0 + -0 is not -0. NaN results are canonical.
//   Status  InvalidArgument if counts differ; then nothing was written.
absl::Status AccumulateToF32(TypedSpan contribution, absl::Span<float> accumulator);

}  // namespace orlop::kernels
