#include "server/tiers/job_room.h"

#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/memory/accountant.h"

namespace orlop::server {

absl::Status JobRoom::Resize(uint64_t bytes) {
  Reservation before;
  {
    MutexLock lock(&mutex_);
    if (reserved_.reserved_bytes() == bytes) return absl::OkStatus();
    before = std::exchange(reserved_, Reservation());
  }
  before = Reservation();  // gives the old bytes back, so that they can be reserved again
  if (bytes == 0) return absl::OkStatus();
  auto reserved = tiers_->Reserve(use_, bytes);
  if (!reserved.ok()) return reserved.status();
  MutexLock lock(&mutex_);
  reserved_ = *std::move(reserved);
  return absl::OkStatus();
}

absl::StatusOr<BufferPtr> JobRoom::Allocate(uint64_t size_bytes, Fill fill) {
  MutexLock lock(&mutex_);
  return reserved_.Allocate(size_bytes, fill);
}

}  // namespace orlop::server
