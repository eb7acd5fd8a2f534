// A JobRoom is the memory that a job has reserved for one purpose: the staging of gradients, or
// passes over whole tensors. Buffers are allocated from it. Resize replaces the reservation;
// buffers of the old one stay valid.
//   Threads  All methods are safe from any thread.
#pragma once

#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/memory/accountant.h"
#include "server/tiers/tier.h"

namespace orlop::server {

class JobRoom {
 public:
  JobRoom(Use use, Tiers* tiers) : use_(std::move(use)), tiers_(tiers) {}

  const Use& use() const { return use_; }

  // Gives back what is reserved, then reserves `bytes`. It has no effect if exactly `bytes` are
  // reserved. Cold slots may be spilled to free memory, so it may wait for the disk.
  //   Status  ResourceExhausted: nothing is reserved
  absl::Status Resize(uint64_t bytes);

  // Returns a buffer. Does not wait.
  //   Status  ResourceExhausted: too few of the reserved bytes are left
  absl::StatusOr<BufferPtr> Allocate(uint64_t size_bytes, Fill fill = Fill::kZeros);

 private:
  const Use use_;
  Tiers* const tiers_;
  Mutex mutex_;
  Reservation reserved_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
