// The apply: version s+1 of a shard from version s and what is staged. The slots are changed one by
// one; the caller makes them one unit, by holding them and refusing readers meanwhile.
#pragma once

#include "absl/status/status.h"
#include "server/job/slots.h"
#include "server/shards/shard.h"
#include "server/shards/shard_update.h"
#include "server/shards/working_slots.h"
#include "server/tiers/slot_home.h"

namespace orlop::server {

// Steps the slots of a shard with its staged gradient. `slots` are of the shard, none opened yet.
// Waits for the disk if slots are there, and for a reader that keeps the only memory left.
//   Status  FailedPrecondition (not staged), InvalidArgument (scalars or a pass of another
//           optimizer), DataLoss, ResourceExhausted: nothing has changed then
absl::Status ApplyGradient(const Shard& shard, const TensorOptimizer& optimizer,
                           const ShardUpdate& update, WorkingSlots* slots);

// Makes the filled planes of a LOAD the slots of a shard. Waits for the disk.
//   Status  FailedPrecondition (not staged; LOADING: the first LOAD sets nothing here)
absl::Status ApplyLoad(Shard* shard, const SlotHold& hold, int64_t version);

}  // namespace orlop::server
