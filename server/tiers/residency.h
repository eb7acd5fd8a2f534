// The Residency of a job decides which of its slots are in memory and which are on disk. It
// reserves the room of new slots, spills cold slots if memory is needed, and reads them back for a
// step, into the window of the job (server/tiers/window.h).
//
// ForEachColdest is the whole policy. A job uses its shards in a cycle, so all sets of resident
// slots of one size have the same hit rate. The shard whose next use is farthest away is spilled
// first, because that leaves the most time to bring it back. Weights are spilled last, because
// every pull reads them.
//   Threads  All methods are safe from any thread.
//   Locks    A method that may spill waits for the disk, and takes the lock of the slots of one
//            shard at a time.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/tiers/slot_home.h"
#include "server/tiers/tier.h"
#include "server/tiers/use_order.h"
#include "server/tiers/window.h"

namespace orlop::server {

class Residency : public Spillable {
 public:
  // `homes` are the slots of all shards of the job on this server, by ascending id. They and
  // `tiers` outlive the object.
  Residency(std::string job, Tiers* tiers, std::vector<SlotHome*> homes);
  ~Residency() override;

  Tiers* tiers() const { return tiers_; }

  // ---- Order of use: as in UseOrder ----
  void Used(int32_t shard, int64_t version) { order_.Used(shard, version); }
  std::vector<int32_t> NextUse() const { return order_.Next(); }

  // ---- Room ----
  // Gives a slot that does not exist yet its format and its room: in memory, or on disk if too
  // little memory is free or `first` is NVME. A slot on disk also requires the window. Slots of
  // other jobs may be spilled to make room; slots of this job are spilled for the window only. May
  // wait for the disk.
  //   Status  ResourceExhausted: the slot has no room, and its format may be set
  absl::Status Place(SlotHome* home, Slot slot, const SlotFormat& format, Tier first = Tier::kDram);
  // Returns the memory that the window is still to take if a shard whose slots take `shard_bytes`
  // goes to disk; 0 if nothing can go there.
  uint64_t WindowToOpen(uint64_t shard_bytes) const;
  // Adds the smallest memory budget that would suffice to an error of Place, in the message and as
  // `limit` of its detail. `resident_bytes` is the room of all slots of the job; `other_bytes` is
  // the other memory that the job needs.
  absl::Status WithSmallestBudget(const absl::Status& status, uint64_t resident_bytes,
                                  uint64_t other_bytes) const;
  // Checks that the disk has room for one apply now; OK if the job has no window. Call it before a
  // step is committed: a committed step should not have to wait for a full disk. May wait for the
  // disk.
  //   Status  ResourceExhausted (BUDGET)
  absl::Status CheckDisk() const;

  // ---- Slots for a step ----
  // Leases the window for all spilled slots of `home`, whose slots the caller holds. The lease is
  // empty if none is spilled. Waits until nobody else has the lease, and may wait for the disk.
  //   Status  ResourceExhausted: the window cannot be reserved
  absl::StatusOr<Window::Lease> Lease(const SlotHome& home);
  // As SlotHome::Bring with the window of the job. If the window is full, it may hold stranded
  // slots: slots of tier NVME that are in memory because their write has failed. They are then
  // written back first.
  absl::StatusOr<BufferPtr> Bring(SlotHome* home, const SlotHold& hold, Slot slot);
  // Tries again to write stranded slots to disk. Slots that somebody holds are left out. May wait
  // for the disk.
  void WriteBackStranded();

  // As Spillable::SpillCold. The bytes that the window of the job then takes do not count as given
  // back.
  uint64_t SpillCold(uint64_t wanted_bytes) override;
  uint64_t BringBack(uint64_t most_bytes) override;
  std::pair<std::chrono::steady_clock::time_point, std::string> Rank() const override {
    return {order_.last_use(), job_};
  }

 private:
  uint64_t WindowBytes() const;
  absl::Status OpenWindow();
  absl::Status EnsureWindow(uint64_t bytes);
  bool SpillPays(uint64_t window_bytes) const;
  uint64_t SpillSome(uint64_t wanted_bytes);
  // Calls `visit` with the slots, the coldest first, until it returns false: first all slots but
  // the weights, by shard, then the weights. A shard whose next use is farther away is colder.
  void ForEachColdest(absl::FunctionRef<bool(SlotHome*, Slot)> visit) const;

  const std::string job_;
  Tiers* const tiers_;
  const std::vector<SlotHome*> homes_;
  UseOrder order_;
  Window window_;
};

}  // namespace orlop::server
