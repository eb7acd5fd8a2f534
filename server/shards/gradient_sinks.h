// Where the bytes of gradient pieces go: into one buffer as they come, scattered over a shard, or
// decoded from int8 first.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/box.h"
#include "orlop/v1/types.pb.h"
#include "server/memory/accountant.h"
#include "server/shards/piece_writer.h"
#include "server/shards/shard_info.h"

namespace orlop::server {

// In what dtype a gradient is staged: int8 with block scales is decoded to bf16 as it arrives.
inline v1::DType StagedDType(v1::DType wire) {
  return wire == v1::DTYPE_I8_BLOCK ? v1::DTYPE_BF16 : wire;
}

// Keeps bytes in `owner` from `offset_bytes` on.
std::unique_ptr<PieceSink> FlatSink(BufferPtr owner, uint64_t offset_bytes);

// Keeps the elements of a box at their places in `owner`, which has all elements of the shard, in
// the staged dtype. `box` is simplified.
std::unique_ptr<PieceSink> BoxSink(BufferPtr owner, const ShardInfo& shard, const Box& box,
                                   v1::DType dtype);

// Decodes int8 with block scales to bf16 for `sink`. `name` is the piece in messages. Sets what the
// sink takes at once in `options`.
//   Write   InvalidArgument (a scale is negative or not finite)
std::unique_ptr<PieceSink> Int8Sink(std::unique_ptr<PieceSink> sink, PieceWriter::Options* options);

}  // namespace orlop::server
