// The slots of one shard while a step, or the pass before it, works on them: in memory, whatever
// they were before.
//   Threads  one owner, who holds the slots. Opening waits for the disk if slots are there.
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
  // All outlive this.
  WorkingSlots(SlotHome* home, const SlotHold* hold, Residency* residency)
      : home_(home), hold_(hold), residency_(residency), formats_(home->formats()) {}

  const SlotFormat& format(Slot slot) const { return formats_[SlotIndex(slot)]; }

  // Takes the job's window if slots are on disk: before any is opened. Status as Residency::Lease.
  absl::Status LeaseWindow();
  // Opens a slot that exists. Status as SlotHome::Bring.
  absl::Status OpenToRead(Slot slot);
  // As OpenToRead; a reader that keeps the old bytes gets to keep them: the slot is opened as a
  // fresh buffer, the weight's without contents. If there is no memory for one, waits until the
  // reader is done; its call ends when nothing is taken (server/lanes/stall_watch.h).
  absl::Status OpenToWrite(Slot slot);
  // Makes what was opened to be written the contents of the slots. If the disk refuses, they stay
  // in memory until it takes them.
  void Keep(int64_t version);

  // A slot that was opened; empty if it was not.
  template <typename T>
  absl::Span<T> as(Slot slot) const {
    const BufferPtr& buffer = buffers_[SlotIndex(slot)];
    return buffer ? buffer->as<T>() : absl::Span<T>();
  }
  // The step of the shard in these slots. `gradient`: one value for each element.
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
  std::array<Reservation, kStoredSlotCount> rooms_;  // of fresh buffers beside a reader's
  BufferPtr old_weight_;  // what a reader keeps; null: the weight is written in place
};

}  // namespace orlop::server
