// The apply: it makes version s+1 of a shard from version s and what is staged. Slots change one by
// one. The caller makes the change one unit: it holds the slots and has called
// SlotHome::BeginChange, so that no new reader sees them.
#pragma once

#include "absl/status/status.h"
#include "server/job/slots.h"
#include "server/shards/shard.h"
#include "server/shards/shard_update.h"
#include "server/shards/working_slots.h"
#include "server/tiers/slot_home.h"

namespace orlop::server {

// Steps the slots of a shard with its staged gradient. `slots` are those of the shard, and none of
// them is open yet. Waits for the disk if slots are there. If a reader keeps a slot's buffer and
// there is no memory for a fresh one, waits for the reader. After an error nothing has changed.
//   Status  FailedPrecondition (no gradient is staged), InvalidArgument (the scalars are of another
//           optimizer, or the pass is missing), DataLoss, ResourceExhausted
absl::Status ApplyGradient(const Shard& shard, const TensorOptimizer& optimizer,
                           const ShardUpdate& update, WorkingSlots* slots);

// Makes the filled planes of a LOAD the contents of a shard's slots; `version` is that of the LOAD.
// Waits for the disk.
//   Status  FailedPrecondition (the LOAD is not staged, or LOADING: the first LOAD sets nothing of
//           this shard)
absl::Status ApplyLoad(Shard* shard, const SlotHold& hold, int64_t version);

}  // namespace orlop::server
