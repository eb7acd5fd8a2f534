// The memory that a job has reserved for one purpose (staging, passes). Threads take buffers from
// it; the reservation is replaced as a whole, and buffers outlive it.
//   Threads  any
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

  // Gives back what is reserved, then reserves `bytes`; no effect if that many are reserved. Cold
  // slots may move to disk for it, so it waits for the disk.
  //   Status  ResourceExhausted: nothing is reserved then
  absl::Status Resize(uint64_t bytes);

  // A buffer, contents zero. Does not wait.
  //   Status  ResourceExhausted: too little is left
  absl::StatusOr<BufferPtr> Allocate(uint64_t size_bytes);

 private:
  const Use use_;
  Tiers* const tiers_;
  Mutex mutex_;
  Reservation reserved_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
