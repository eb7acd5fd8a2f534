#include "server/tiers/window.h"

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/memory/accountant.h"

namespace orlop::server {

uint64_t Window::memory_bytes() const {
  MutexLock lock(&mutex_);
  return memory_.reserved_bytes();
}

uint64_t Window::disk_bytes() const {
  MutexLock lock(&mutex_);
  return disk_.reserved_bytes();
}

// If the disk has no room, no memory is reserved either.
absl::Status Window::Grow(uint64_t bytes) {
  if (absl::Status disk = GrowOnDisk(bytes); !disk.ok()) return disk;
  MutexLock lock(&mutex_);
  return accountant_->Grow(&memory_, memory_use_, bytes);
}

absl::Status Window::GrowOnDisk(uint64_t bytes) {
  MutexLock lock(&mutex_);
  return accountant_->Grow(&disk_, disk_use_, bytes);
}

absl::StatusOr<BufferPtr> Window::Allocate(uint64_t size_bytes, Fill fill) {
  MutexLock lock(&mutex_);
  return memory_.Allocate(size_bytes, fill);
}

void Window::Take() {
  MutexLock lock(&mutex_);
  while (taken_) given_.Wait(&mutex_);
  taken_ = true;
}

void Window::Give() {
  MutexLock lock(&mutex_);
  taken_ = false;
  given_.Signal();
}

}  // namespace orlop::server
