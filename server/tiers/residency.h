// Which slots of one job are in memory and which on disk. It places slots, moves cold ones out when
// memory is wanted, and brings them back for a step, through the job's window.
//
// The policy is one function, ForEachColdest, over the order of next use: access is cyclic, so any
// fixed resident set is hit alike; what was used last goes first, which leaves the most time to
// bring it back. Weights go last, as every pull wants them.
//   Threads  all methods are safe from any thread.
//   Locks    methods that may move slots wait for the disk, and take the lock of Tiers, then that
//            of a shard's slots, one at a time.
#pragma once

#include <cstdint>
#include <string>
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
  // `homes`: the slots of all shards of the job on this server, by ascending id. They and `tiers`
  // outlive this.
  Residency(std::string job, Tiers* tiers, std::vector<SlotHome*> homes);
  ~Residency() override;

  Tiers* tiers() const { return tiers_; }

  // ---- Order of use ----
  void Used(int32_t shard, int64_t version) { order_.Used(shard, version); }
  std::vector<int32_t> NextUse() const { return order_.Next(); }

  // ---- Room ----
  // Gives a slot that does not exist its format and its room: in memory while that lasts, then on
  // disk, which takes the window to bring one shard back. Of this job's slots it moves some only
  // for the window; those of other jobs may go to disk for the slot.
  //   Status  ResourceExhausted: the slot has no room
  absl::Status Place(SlotHome* home, Slot slot, const SlotFormat& format);
  // An error of Place with the smallest memory budget that would do, in the message and as `limit`
  // of its detail. `resident_bytes`: the room of all slots; `other_bytes`: what else the job has to
  // have in memory.
  absl::Status WithSmallestBudget(const absl::Status& status, uint64_t resident_bytes,
                                  uint64_t other_bytes) const;
  // Whether the disk has room now for one apply; a committed step must not wait for a disk. Asks
  // the system.
  //   Status  ResourceExhausted (BUDGET)
  absl::Status CheckDisk() const;

  // ---- Slots for a step ----
  // The window, for who holds the slots of `home` and needs its spilled ones; an empty lease if
  // none is spilled. Waits for the lease before it, and may wait for the disk.
  //   Status  ResourceExhausted
  absl::StatusOr<Window::Lease> Lease(const SlotHome& home);
  // As SlotHome::Bring. If the window is full of slots that a failing disk left there, they are
  // written to disk first.
  absl::StatusOr<BufferPtr> Bring(SlotHome* home, const SlotHold& hold, Slot slot);
  // Writes to disk what a failing disk left in memory, if it works again. Slots that are held stay.
  void WriteBackStranded();

  uint64_t SpillCold(uint64_t wanted_bytes) override;

 private:
  uint64_t WindowBytes() const;
  absl::Status OpenWindow();
  absl::Status EnsureWindow(uint64_t bytes);
  bool SpillPays(uint64_t window_bytes) const;
  uint64_t SpillSome(uint64_t wanted_bytes);
  // Calls `visit` with every slot, the coldest first, until it returns false.
  void ForEachColdest(absl::FunctionRef<bool(SlotHome*, Slot)> visit) const;

  const std::string job_;
  Tiers* const tiers_;
  const std::vector<SlotHome*> homes_;
  UseOrder order_;
  Window window_;
};

}  // namespace orlop::server
