// The memory for a job's staged data on this server: bytes received for an attempt that are not
// applied yet. It is reserved when a contribution layout is set, so that a push does not fail for
// lack of memory.
//   Threads  Any thread may call any method.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/memory/accountant.h"
#include "server/tiers/job_room.h"
#include "server/tiers/residency.h"

namespace orlop::server {

class StagingRoom {
 public:
  StagingRoom(std::string job, Residency* residency)
      : room_({Tier::kDram, std::move(job), "staging"}, residency->tiers()),
        residency_(residency) {}

  // Replaces the reserved bytes; see JobRoom::Resize. May wait for the disk.
  //   Status  ResourceExhausted: nothing is reserved then
  absl::Status Resize(uint64_t bytes) { return room_.Resize(bytes); }

  // Returns a buffer of the reserved bytes; null if too few are unused. Does not wait.
  BufferPtr TryAllocate(uint64_t bytes, Fill fill = Fill::kZeros) {
    return room_.Allocate(bytes, fill).value_or(nullptr);
  }

  // Returns a buffer. It is taken from the reserved bytes if enough are unused.
  // Otherwise it is reserved in addition to them: the reserved bytes can be too few if a dtype is
  // wider than the manifest's, or if a broken stream still holds its buffer. May wait for the disk.
  //   Status  ResourceExhausted
  absl::StatusOr<BufferPtr> Allocate(uint64_t bytes, Fill fill = Fill::kZeros);

  // Reserves memory in addition to the reserved bytes, if it is free now. Does not wait.
  //   Status  ResourceExhausted
  absl::StatusOr<Reservation> TryReserve(uint64_t bytes) {
    return residency_->tiers()->accountant().Reserve(room_.use(), bytes);
  }
  // Reserves as TryReserve does, but may spill cold slots to free the memory, and then waits for
  // the disk.
  absl::StatusOr<Reservation> Reserve(uint64_t bytes) {
    return residency_->tiers()->Reserve(room_.use(), bytes);
  }

 private:
  JobRoom room_;
  Residency* const residency_;
};

}  // namespace orlop::server
