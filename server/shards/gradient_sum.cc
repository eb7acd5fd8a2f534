#include "server/shards/gradient_sum.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "base/checksum.h"
#include "kernels/reduce.h"
#include "kernels/types.h"
#include "orlop/v1/types.pb.h"
#include "proto/dtype.h"
#include "server/memory/accountant.h"
#include "server/shards/gradient_sinks.h"
#include "server/shards/shard_info.h"
#include "server/shards/staged.h"

namespace orlop::server {
namespace {

// Adds the elements of a piece to `sum`, which has the elements `range` of the shard.
absl::Status AddPiece(const ShardInfo& shard, const GradientPiece& piece, Range range,
                      absl::Span<float> sum) {
  const Range flat = {shard.range().begin + range.begin, shard.range().begin + range.end};
  const kernels::DType dtype = KernelDType(StagedDType(piece.dtype));
  const uint64_t element_bytes = kernels::SizeOf(dtype);
  uint64_t at =
      BoxElementsBelow(piece.expected.box, shard.tensor->shape, flat.begin) - piece.part.begin;
  absl::Status status;
  ForEachRun(piece.expected.box, shard.tensor->shape, flat, [&](Range run) {
    if (!status.ok()) return;
    status =
        kernels::AccumulateToF32({dtype, piece.bytes->data() + at * element_bytes, run.count()},
                                 sum.subspan(run.begin - flat.begin, run.count()));
    at += run.count();
  });
  return status;
}

// Computes norm and digest of a shard's gradient in `bytes`, leaf by leaf. Before it reads a leaf
// it calls fill(range) for the leaf's elements, which writes them if the gradient is a sum.
template <typename Fill>
absl::StatusOr<StagedShard> Reduce(const ShardInfo& shard, v1::DType dtype, const uint8_t* bytes,
                                   Fill fill) {
  const uint64_t element_bytes = ElementBytes(dtype), leaf_elements = kLeafBytes / element_bytes;
  kernels::BlockSums sums;
  PieceDigest digest;
  for (uint64_t begin = 0; begin < shard.count(); begin += leaf_elements) {
    const Range range = {begin, std::min(begin + leaf_elements, shard.count())};
    if (absl::Status filled = fill(range); !filled.ok()) return filled;
    const uint8_t* leaf = bytes + begin * element_bytes;
    kernels::ReduceGradient({KernelDType(dtype), leaf, range.count()}, &sums);
    const uint64_t hash = Checksum64(leaf, range.count() * element_bytes);
    digest.AddLeaves({&hash, 1});
  }
  return StagedShard{digest.Finish(), sums.sum_squares, sums.nonfinite_count, false};
}

}  // namespace

Range PartOf(const ShardInfo& shard, const Box& box) {
  return BoxPart(box, shard.tensor->shape, shard.range());
}

bool IsDirect(const ShardInfo& shard, const std::vector<ExpectedPiece>& expected) {
  uint64_t count = 0;
  for (const ExpectedPiece& piece : expected) count += PartOf(shard, piece.box).count();
  return count == shard.count();
}

uint64_t StagingBytes(const ShardInfo& shard, const std::vector<ExpectedPiece>& expected) {
  const uint64_t element_bytes = ElementBytes(shard.tensor->dtype);
  if (expected.empty()) return 0;
  if (IsDirect(shard, expected)) return Buffer::Footprint(shard.count() * element_bytes);
  uint64_t bytes = Buffer::Footprint(shard.count() * sizeof(float));
  for (const ExpectedPiece& piece : expected)
    bytes += Buffer::Footprint(PartOf(shard, piece.box).count() * element_bytes);
  return bytes;
}

StagedShard ReducePieces(const ShardInfo& shard, const std::vector<GradientPiece>& pieces,
                         v1::DType dtype, uint8_t* whole) {
  const uint64_t element_bytes = ElementBytes(dtype);
  for (const GradientPiece& piece : pieces)
    if (!piece.stored)
      ForEachRun(piece.expected.box, shard.tensor->shape, shard.range(), [&](Range run) {
        std::memset(whole + (run.begin - shard.range().begin) * element_bytes, 0,
                    run.count() * element_bytes);
      });
  return *Reduce(shard, dtype, whole, [](Range) { return absl::OkStatus(); });
}

absl::StatusOr<StagedShard> SumPieces(const ShardInfo& shard,
                                      const std::vector<GradientPiece>& pieces,
                                      absl::Span<float> sum) {
  return Reduce(shard, v1::DTYPE_F32, reinterpret_cast<const uint8_t*>(sum.data()),
                [&](Range range) -> absl::Status {
                  const absl::Span<float> part = sum.subspan(range.begin, range.count());
                  // -0 + x has the bits of x for every number x, but 0 + -0 is 0.
                  std::fill(part.begin(), part.end(), -0.0f);
                  for (const GradientPiece& piece : pieces)
                    if (piece.stored)
                      if (absl::Status added = AddPiece(shard, piece, range, part); !added.ok())
                        return added;
                  return absl::OkStatus();
                });
}

}  // namespace orlop::server
