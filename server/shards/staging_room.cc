#include "server/shards/staging_room.h"

#include <cstdint>

#include "absl/status/statusor.h"
#include "server/memory/accountant.h"

namespace orlop::server {

absl::StatusOr<BufferPtr> StagingRoom::Allocate(uint64_t bytes, Fill fill) {
  if (BufferPtr buffer = TryAllocate(bytes, fill)) return buffer;
  // If the disk was full when a LOAD was applied, spilled slots still hold buffers of this room.
  residency_->WriteBackStranded();
  if (BufferPtr buffer = TryAllocate(bytes, fill)) return buffer;
  return residency_->tiers()->NewBuffer(room_.use(), bytes, fill);
}

}  // namespace orlop::server
