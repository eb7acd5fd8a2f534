// Makes the staged gradient of a shard from its pieces, with norm and digest. Pure functions; any
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
  // The piece's elements as a range of the box's buffer.
  Range part;
  // A stream is writing the piece.
  bool claimed = false;
  // The whole piece has arrived, and the step machine has accepted it.
  bool stored = false;
  // The dtype on the wire. StagedDType gives the dtype of the bytes here.
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  // The bytes of a piece that is not direct. Null: they are in the shard's buffer, or were added
  // to the sum.
  BufferPtr bytes;
  PieceResult result;
};

// Returns the elements of a box within a shard, as a range of the box's buffer.
Range PartOf(const ShardInfo& shard, const Box& box);
// Returns whether the pieces are direct: every element comes from one contributor, so that pieces
// are written to their places in one buffer of the shard, and nothing is added.
bool IsDirect(const ShardInfo& shard, const std::vector<ExpectedPiece>& expected);
// Returns the memory in bytes for the pieces of a shard in the manifest's dtype. Direct pieces need
// one buffer of the shard; others need a buffer each, and one for their fp32 sum.
uint64_t StagingBytes(const ShardInfo& shard, const std::vector<ExpectedPiece>& expected);

// For direct pieces: takes norm and digest of `whole`, which has all elements of the shard in
// `dtype`. First sets the elements of pieces that were not sent to zero.
StagedShard ReducePieces(const ShardInfo& shard, const std::vector<GradientPiece>& pieces,
                         v1::DType dtype, uint8_t* whole);
// For other pieces: adds those that were sent, in their order, writes the sum to `sum`, and takes
// its norm and digest. `sum` has one fp32 value for each element of the shard.
//   Status  as kernels::AccumulateToF32
absl::StatusOr<StagedShard> SumPieces(const ShardInfo& shard,
                                      const std::vector<GradientPiece>& pieces,
                                      absl::Span<float> sum);

}  // namespace orlop::server
