// What one SetState piece of a shard writes: which stored slots, how, and how many bytes it has.
// Pure; any thread.
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
  Slot slot = Slot::kWeight;  // as the caller names it
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  Box box;  // simplified
  SlotMapping mapping;
  uint64_t total_bytes = 0;
  bool is_whole = false;  // the box has all elements of the shard
};

// Checks a piece against the formats of a shard.
//   Status  InvalidArgument: a box outside the tensor or beside the shard, or not of whole blocks;
//           otherwise as MapSlot
absl::StatusOr<LoadPlan> PlanLoad(const ShardInfo& shard, const SlotFormats& formats, Slot slot,
                                  v1::DType dtype, const Box& box);

// Whether two simplified boxes have an element of the shard in common.
bool Overlap(const ShardInfo& shard, const Box& a, const Box& b);

}  // namespace orlop::server
