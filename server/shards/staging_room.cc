#include "server/shards/staging_room.h"

namespace orlop::server {

absl::StatusOr<BufferPtr> StagingRoom::Allocate(uint64_t bytes) {
  if (BufferPtr buffer = TryAllocate(bytes)) return buffer;
  residency_->WriteBackStranded();  // contents that a LOAD left here while the disk was full
  if (BufferPtr buffer = TryAllocate(bytes)) return buffer;
  return residency_->tiers()->NewBuffer(room_.use(), bytes);
}

}  // namespace orlop::server
