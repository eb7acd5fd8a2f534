#include "server/shards/staging_room.h"

#include <cstdint>

#include "absl/status/statusor.h"
#include "server/memory/accountant.h"

namespace orlop::server {

absl::StatusOr<BufferPtr> StagingRoom::Allocate(uint64_t bytes) {
  if (BufferPtr buffer = TryAllocate(bytes)) return buffer;
  // If the disk was full when a LOAD was applied, spilled slots still hold buffers of this room.
  residency_->WriteBackStranded();
  if (BufferPtr buffer = TryAllocate(bytes)) return buffer;
  return residency_->tiers()->NewBuffer(room_.use(), bytes);
}

}  // namespace orlop::server
