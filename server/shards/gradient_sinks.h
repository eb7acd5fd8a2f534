// The sinks of gradient pieces. A sink writes the bytes of a piece to one range of a buffer, or
// scatters its elements over the buffer of a shard. Int8 blocks are decoded first.
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

// Returns the dtype in which a gradient is staged that has the dtype `wire` on the wire. Int8 with
// block scales is decoded to bf16 as it arrives; all others stay as they are.
inline v1::DType StagedDType(v1::DType wire) {
  return wire == v1::DTYPE_I8_BLOCK ? v1::DTYPE_BF16 : wire;
}

// Returns a sink that writes the bytes of a piece, in the order of the piece, to `owner` from byte
// `offset_bytes` on.
std::unique_ptr<PieceSink> FlatSink(BufferPtr owner, uint64_t offset_bytes);

// Returns a sink that writes the elements of `box` to their places in `owner`, which has one
// element of `dtype`, the staged dtype, for each element of the shard. `box` must be simplified
// (base/box.h).
std::unique_ptr<PieceSink> BoxSink(BufferPtr owner, const ShardInfo& shard, const Box& box,
                                   v1::DType dtype);

// Returns a sink that decodes int8 blocks with scales to bf16 and passes the values to `sink`. Its
// messages name the piece by options->name. Sets options->sink_bytes.
//   Status  of Write: InvalidArgument (a scale is negative or not finite)
std::unique_ptr<PieceSink> Int8Sink(std::unique_ptr<PieceSink> sink, PieceWriter::Options* options);

}  // namespace orlop::server
