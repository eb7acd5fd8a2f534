// The one door to all bytes of a shard, committed and staged: for a flush, and for whoever copies a
// shard or brings it back. Formats on disk or on the wire are the caller's.
//
// It holds the slots: no apply and no spill goes on while it lives. No stream may be writing to the
// shard.
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
#include "server/memory/accountant.h"
#include "server/shards/gradient_stage.h"
#include "server/shards/load_stage.h"
#include "server/shards/shard.h"
#include "server/shards/shard_info.h"
#include "server/shards/staging_room.h"
#include "server/tiers/slot_home.h"

namespace orlop::server {

class ShardImage {
 public:
  // Waits until nobody else holds the slots. Both outlive this.
  ShardImage(Shard* shard, StagingRoom* staging)
      : shard_(shard), staging_(staging), hold_(&shard->slots) {}

  const ShardInfo& info() const { return shard_->info; }
  int64_t version() const { return shard_->slots.version(); }
  SlotFormats formats() const { return shard_->slots.formats(); }

  // ---- Reading ----
  // The bytes of a slot; null: all equal to its initial byte, or the shard has no such slot.
  //   Status  DataLoss, ResourceExhausted
  absl::StatusOr<BufferPtr> ReadSlot(Slot slot) const { return shard_->slots.Read(hold_, slot); }
  // What is staged; nullopt: nothing.
  std::optional<GradientImage> ReadGradient() const;
  std::optional<LoadImage> ReadLoad() const;
  // The plane of a slot in the staged LOAD; null: there is none. Status as ReadSlot.
  absl::StatusOr<BufferPtr> ReadPlane(Slot slot) const;

  // ---- Replacing ----
  void set_version(int64_t version) { shard_->slots.set_version(hold_, version); }
  void ClearSlot(Slot slot) { shard_->slots.Clear(hold_, slot); }
  // Drops the bytes of a slot and returns a buffer for new ones; then KeepSlot.
  //   Status  ResourceExhausted
  absl::StatusOr<BufferPtr> NewSlot(Slot slot) { return shard_->slots.Replace(hold_, slot); }
  //   Status  ResourceExhausted, DataLoss: the disk has not taken it
  absl::Status KeepSlot(Slot slot, BufferPtr bytes) {
    return shard_->slots.Keep(hold_, slot, version(), {std::move(bytes)});
  }
  // A buffer for staged bytes. Status ResourceExhausted.
  absl::StatusOr<BufferPtr> NewStaged(uint64_t bytes) { return staging_->Allocate(bytes); }
  // Replace what is staged. Pieces of a gradient are those of the contribution layout, by rank,
  // then region; their boxes may be left out.
  //   Status  FailedPrecondition (other pieces than the layout expects)
  absl::Status InstallGradient(GradientImage image);
  // `planes`: by SlotIndex; null: none.
  void InstallLoad(LoadImage image, std::array<BufferPtr, kStoredSlotCount> planes);

 private:
  Shard* const shard_;
  StagingRoom* const staging_;
  const SlotHold hold_;
};

}  // namespace orlop::server
