// The slots of one shard while a step, or the pass before it, works on them. Slots on disk are
// brought into memory for that time.
//   Threads  one owner, who holds the slots (SlotHold). Opening a slot on disk waits for the disk.
#pragma once

#include <array>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/optimizer.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/shard_info.h"
#include "server/shards/shard_update.h"
#include "server/tiers/residency.h"
#include "server/tiers/slot_home.h"
#include "server/tiers/window.h"

namespace orlop::server {

class WorkingSlots {
 public:
  // The arguments must outlive this object.
  WorkingSlots(SlotHome* home, const SlotHold* hold, Residency* residency)
      : home_(home), hold_(hold), residency_(residency), formats_(home->formats()) {}

  const SlotFormat& format(Slot slot) const { return formats_[SlotIndex(slot)]; }

  // Leases the job's window if slots are on disk. Call it before any slot is opened. Status as
  // Residency::Lease.
  absl::Status LeaseWindow();
  // Opens a slot that exists, for reading. Status as SlotHome::Bring.
  absl::Status OpenToRead(Slot slot);
  // Opens a slot that exists, for writing. If a reader keeps the slot's buffer, opens a fresh
  // buffer with the same contents, except that the contents of a fresh weight are not set. If there
  // is no memory for a fresh buffer, waits until the reader has released the old one; a reader
  // whose caller takes nothing is cancelled (Gate::Tick). Status as SlotHome::Bring.
  absl::Status OpenToWrite(Slot slot);
  // Makes the buffers that were opened the contents of their slots at `version`. Contents that the
  // disk refuses stay in memory until it takes them.
  void Keep(int64_t version);

  // Returns the elements of an open slot; an empty span if it is not open.
  template <typename T>
  absl::Span<T> as(Slot slot) const {
    const BufferPtr& buffer = buffers_[SlotIndex(slot)];
    return buffer ? buffer->as<T>() : absl::Span<T>();
  }
  // Returns the description of this shard's step for kernels::Step. `gradient` has one value for
  // each element. The description points into these slots and into `update`, which must outlive it;
  // slots that are not open are null.
  kernels::RangeStep StepOf(const ShardUpdate& update, const TensorOptimizer& optimizer,
                            const ShardInfo& shard, kernels::TypedSpan gradient) const;

 private:
  absl::Status OpenBesideReader(Slot slot);
  BufferPtr& buffer(Slot slot) { return buffers_[SlotIndex(slot)]; }

  SlotHome* const home_;
  const SlotHold* const hold_;
  Residency* const residency_;
  const SlotFormats formats_;
  Window::Lease lease_;
  std::array<BufferPtr, kStoredSlotCount> buffers_;
  // The reservations of fresh buffers.
  std::array<Reservation, kStoredSlotCount> rooms_;
  // The weight that a reader keeps. Null: the weight is written in place.
  BufferPtr old_weight_;
};

}  // namespace orlop::server
