// Reads and replaces all bytes of a shard, committed and staged. A flush, a restore and a copy of a
// shard all use it. The format of the bytes on disk or on the wire is the caller's.
//
// An image holds the slots (SlotHold), so that no apply and no spill of the shard runs while it
// lives. The caller makes sure that no stream writes to the shard.
//   Threads  one owner. Calls that read or write slots wait for the disk if slots are there.
//
// Example: a copy
//   for each slot:  auto bytes = from.ReadSlot(slot);
//                   if (*bytes) { auto to_fill = to.NewSlot(slot); copy; to.KeepSlot(slot, ...); }
//                   else to.ClearSlot(slot);
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"      // IWYU pragma: export
#include "server/shards/gradient_stage.h"  // IWYU pragma: export
#include "server/shards/gradient_sum.h"    // IWYU pragma: export
#include "server/shards/load_stage.h"      // IWYU pragma: export
#include "server/shards/shard.h"
#include "server/shards/shard_info.h"  // IWYU pragma: export
#include "server/shards/staging_room.h"
#include "server/tiers/slot_home.h"

namespace orlop::server {

class ShardImage {
 public:
  // Waits until nobody else holds the slots. `shard` and `staging` must outlive the image.
  ShardImage(Shard* shard, StagingRoom* staging)
      : shard_(shard), staging_(staging), hold_(&shard->slots) {}

  const ShardInfo& info() const { return shard_->info; }
  int64_t version() const { return shard_->slots.version(); }
  SlotFormats formats() const { return shard_->slots.formats(); }

  // ---- Reading ----
  // Returns the bytes of a slot. Null: all of them are the format's initial byte, or the shard has
  // no such slot.
  //   Status  DataLoss, ResourceExhausted
  absl::StatusOr<BufferPtr> ReadSlot(Slot slot) const { return shard_->slots.Read(hold_, slot); }
  // Return the staged gradient and the staged LOAD; nullopt if there is none.
  std::optional<GradientImage> ReadGradient() const;
  std::optional<LoadImage> ReadLoad() const;
  // Returns the plane of a slot in the staged LOAD; null if there is none. Status as ReadSlot.
  absl::StatusOr<BufferPtr> ReadPlane(Slot slot) const;

  // ---- Replacing ----
  void set_version(int64_t version) { shard_->slots.set_version(hold_, version); }
  void ClearSlot(Slot slot) { shard_->slots.Clear(hold_, slot); }
  // Drops the bytes of a slot and returns a buffer for new ones, which KeepSlot takes.
  //   Status  ResourceExhausted
  absl::StatusOr<BufferPtr> NewSlot(Slot slot);
  // Makes `bytes` the contents of a slot. Call set_version before.
  //   Status  ResourceExhausted, DataLoss: the disk has refused the bytes, which stay in memory
  absl::Status KeepSlot(Slot slot, BufferPtr bytes) {
    return shard_->slots.Keep(hold_, slot, version(), {std::move(bytes)},
                              std::exchange(new_room_, Reservation()));
  }
  // Returns a buffer for staged bytes. Status ResourceExhausted.
  absl::StatusOr<BufferPtr> NewStaged(uint64_t bytes) { return staging_->Allocate(bytes); }
  // Replaces the staged gradient. The pieces must be those of the contribution layout, by rank,
  // then region; their boxes may be left out.
  //   Status  FailedPrecondition (other pieces than the layout expects, or other bytes than they
  //           have)
  absl::Status InstallGradient(GradientImage image);
  // Replaces the staged LOAD. `planes` are by SlotIndex; null: the slot has no plane.
  //   Status  FailedPrecondition (a piece or a plane does not fit the shard's slots)
  absl::Status InstallLoad(LoadImage image, std::array<BufferPtr, kStoredSlotCount> planes);

 private:
  Shard* const shard_;
  StagingRoom* const staging_;
  const SlotHold hold_;
  Reservation new_room_;  // of the last NewSlot, if the slot had none (SlotState::is_unplaced)
};

}  // namespace orlop::server
