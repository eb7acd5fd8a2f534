// The plan of one SetState piece of a shard: which stored slots it writes, by which conversion, and
// how many bytes it has. Pure functions; any thread.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "base/box.h"
#include "orlop/v1/types.pb.h"
#include "server/job/slots.h"
#include "server/shards/shard_info.h"
#include "server/shards/slot_mapping.h"

namespace orlop::server {

struct LoadPlan {
  // The slot that the caller names, which may be kMaster.
  Slot slot = Slot::kWeight;
  // The dtype of the piece.
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  // Simplified (base/box.h).
  Box box;
  SlotMapping mapping;
  // Size of the piece.
  uint64_t total_bytes = 0;
  // The box has all elements of the shard.
  bool is_whole = false;
};

// Plans a piece after checking it against the formats of a shard.
//   Status  InvalidArgument (the box is not inside the tensor, does not meet the shard, or is not
//           whole blocks where it must be), or as MapSlot
absl::StatusOr<LoadPlan> PlanLoad(const ShardInfo& shard, const SlotFormats& formats, Slot slot,
                                  v1::DType dtype, const Box& box);

// Returns whether two simplified boxes have an element of the shard in common. Two boxes that are
// not flat are compared in the whole tensor.
bool Overlap(const ShardInfo& shard, const Box& a, const Box& b);

}  // namespace orlop::server
