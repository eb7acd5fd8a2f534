// The window of one job: the room in memory that one apply needs to bring the spilled slots of a
// shard back, and the same on disk, where a new value is written before the old one goes. A job
// whose slots are all in memory has none.
//   Threads  any. Nothing here waits for the disk; a Lease waits for the lease before it.
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
  // The use of the window's memory, until destroyed. An empty one leases nothing.
  class Lease {
   public:
    Lease() = default;
    // Waits until nobody else has the window.
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
  uint64_t memory_bytes() const;
  uint64_t disk_bytes() const;

  // Reserves what is missing of `bytes`, beside an apply that uses what is there. Both only grow.
  //   Status  ResourceExhausted: what is reserved stays
  absl::Status Grow(uint64_t bytes);
  absl::Status GrowOnDisk(uint64_t bytes);

  // A buffer in the window's memory, contents zero; for who has the lease.
  //   Status  ResourceExhausted
  absl::StatusOr<BufferPtr> Allocate(uint64_t size_bytes);

 private:
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
