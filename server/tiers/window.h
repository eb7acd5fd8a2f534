// A Window belongs to one job. It is the memory that one apply needs to bring the spilled slots of
// a shard back, and as many bytes on disk, since a new value is written before the old one is
// erased. A job whose slots are all in memory has an empty window.
//   Threads  All methods are safe from any thread. Nothing waits for the disk. The constructor of a
//            Lease waits until nobody else has the lease.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/memory/accountant.h"

namespace orlop::server {

class Window {
 public:
  // A Lease is the exclusive right to use the window's memory, until it is destroyed. A default
  // Lease has no window.
  class Lease {
   public:
    Lease() = default;
    // Waits until nobody else has the lease. `window` outlives it.
    explicit Lease(Window* window) : window_(window) { window_->Take(); }
    Lease(Lease&& other) noexcept : window_(std::exchange(other.window_, nullptr)) {}
    Lease& operator=(Lease&& other) noexcept {
      std::swap(window_, other.window_);
      return *this;
    }
    ~Lease() {
      if (window_ != nullptr) window_->Give();
    }

   private:
    Window* window_ = nullptr;
  };

  Window(std::string job, Accountant* accountant)
      : memory_use_{Tier::kDram, job, "apply"},
        disk_use_{Tier::kNvme, std::move(job), "apply"},
        accountant_(accountant) {}

  const Use& memory_use() const { return memory_use_; }
  uint64_t memory_bytes() const;  // reserved
  uint64_t disk_bytes() const;    // reserved

  // Reserve more until the window has `bytes`: Grow on disk and in memory, GrowOnDisk on disk
  // alone. No lease is needed. The window never shrinks.
  //   Status  ResourceExhausted: the bytes that are reserved stay so
  absl::Status Grow(uint64_t bytes);
  absl::Status GrowOnDisk(uint64_t bytes);

  // Returns a zero-filled buffer in the window's memory. Only the owner of the lease may call it.
  //   Status  ResourceExhausted: too few of the reserved bytes are left
  absl::StatusOr<BufferPtr> Allocate(uint64_t size_bytes, Fill fill);

 private:
  // Take waits until no lease holds the window, then takes it. Give lets the next lease take it.
  void Take();
  void Give();

  const Use memory_use_, disk_use_;
  Accountant* const accountant_;
  mutable Mutex mutex_;
  CondVar given_;
  bool taken_ GUARDED_BY(mutex_) = false;
  Reservation memory_ GUARDED_BY(mutex_), disk_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
