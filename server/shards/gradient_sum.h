// From the pieces of a shard's gradient to its staged values, their norm and digest. Pure; any
// thread.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "orlop/v1/types.pb.h"
#include "server/job/contributions.h"
#include "server/memory/accountant.h"
#include "server/shards/piece_writer.h"
#include "server/shards/shard_info.h"
#include "server/shards/staged.h"

namespace orlop::server {

// A gradient piece that the layout asks for.
struct GradientPiece {
  ExpectedPiece expected;
  Range part;            // of the box's buffer, in elements
  bool claimed = false;  // a stream is writing it
  bool stored = false;
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;  // on the wire; see StagedDType
  BufferPtr bytes;                          // its own; null: it is in the shard's buffer
  PieceResult result;
};

// The elements of a box within a shard, as a range of the box's buffer.
Range PartOf(const ShardInfo& shard, const Box& box);
// Every element comes from one contributor, so that pieces can be kept at their places in the
// shard.
bool IsDirect(const ShardInfo& shard, const std::vector<ExpectedPiece>& expected);
// Memory for the pieces of a shard in the manifest's dtype: if they are direct, the bytes of one
// gradient; otherwise the part of each and their fp32 sum.
uint64_t StagingBytes(const ShardInfo& shard, const std::vector<ExpectedPiece>& expected);

// Direct pieces: sets the elements of pieces that were not sent to zero in `whole`, all elements of
// the shard in `dtype`.
StagedShard ReducePieces(const ShardInfo& shard, const std::vector<GradientPiece>& pieces,
                         v1::DType dtype, uint8_t* whole);
// Other pieces: adds those that were sent, in their order, into `sum`, fp32, one for each element
// of the shard.
absl::StatusOr<StagedShard> SumPieces(const ShardInfo& shard,
                                      const std::vector<GradientPiece>& pieces,
                                      absl::Span<float> sum);

}  // namespace orlop::server
