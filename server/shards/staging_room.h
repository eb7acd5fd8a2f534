// Memory for what is staged on one job's shards: bytes received for an attempt that are not applied
// yet. A contribution layout reserves it, so that a push does not fail for lack of room.
//   Threads  any
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

  // As JobRoom::Resize.
  absl::Status Resize(uint64_t bytes) { return room_.Resize(bytes); }

  // A buffer of the reserved bytes, contents zero; null if too little is left. Does not wait.
  BufferPtr TryAllocate(uint64_t bytes) { return room_.Allocate(bytes).value_or(nullptr); }

  // A buffer, contents zero: of the reserved bytes, or beside them if a dtype is wider than the
  // manifest's or a broken stream has not given its buffer back. May wait for the disk.
  //   Status  ResourceExhausted
  absl::StatusOr<BufferPtr> Allocate(uint64_t bytes);

  // Memory beside the reserved bytes if it is free now. Does not wait.
  //   Status  ResourceExhausted
  absl::StatusOr<Reservation> TryReserve(uint64_t bytes) {
    return residency_->tiers()->accountant().Reserve(room_.use(), bytes);
  }
  // As TryReserve, but cold slots may move to disk for it: waits for the disk.
  absl::StatusOr<Reservation> Reserve(uint64_t bytes) {
    return residency_->tiers()->Reserve(room_.use(), bytes);
  }

 private:
  JobRoom room_;
  Residency* const residency_;
};

}  // namespace orlop::server
