#include "server/shards/working_slots.h"

#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "kernels/optimizer.h"
#include "kernels/types.h"
#include "proto/status.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/shard_info.h"
#include "server/shards/shard_update.h"

namespace orlop::server {
namespace {

// The pause between two tries to reserve memory in OpenBesideReader.
constexpr std::chrono::milliseconds kRoomPoll(5);

}  // namespace

absl::Status WorkingSlots::LeaseWindow() {
  auto lease = residency_->Lease(*home_);
  if (!lease.ok()) return lease.status();
  lease_ = *std::move(lease);
  return absl::OkStatus();
}

absl::Status WorkingSlots::OpenToRead(Slot slot) {
  buffer(slot) = home_->data(*hold_, slot);
  if (buffer(slot)) return absl::OkStatus();
  auto brought = residency_->Bring(home_, *hold_, slot);
  if (!brought.ok()) return brought.status();
  buffer(slot) = *brought;
  // A DRAM slot without bytes was never written, or its bytes are on disk. Bring made them in the
  // slot's own reservation, so they become its contents. Keep fails only for slots on disk.
  if (home_->tier(slot) == Tier::kDram)
    (void)home_->Keep(*hold_, slot, home_->version(), {*std::move(brought)});
  return absl::OkStatus();
}

absl::Status WorkingSlots::OpenToWrite(Slot slot) {
  if (home_->is_shared(*hold_, slot)) return OpenBesideReader(slot);
  buffer(slot) = home_->data(*hold_, slot);
  if (buffer(slot)) return absl::OkStatus();
  auto brought = residency_->Bring(home_, *hold_, slot);
  if (!brought.ok()) return brought.status();
  buffer(slot) = *std::move(brought);
  return absl::OkStatus();
}

// Opens a slot as a fresh buffer beside the one that a reader keeps. The wait for memory ends,
// since the server cancels a read whose caller takes nothing (Gate::Tick).
absl::Status WorkingSlots::OpenBesideReader(Slot slot) {
  const uint64_t bytes = format(slot).Bytes(home_->element_count());
  const Use use = home_->RoomOf(Tier::kDram, slot);
  auto room = residency_->tiers()->Reserve(use, Buffer::Footprint(bytes));
  while (!room.ok()) {
    // The reader has released the old buffer, so the slot can be written in place.
    if (!home_->is_shared(*hold_, slot)) {
      buffer(slot) = home_->data(*hold_, slot);
      return absl::OkStatus();
    }
    std::this_thread::sleep_for(kRoomPoll);
    room = residency_->tiers()->Reserve(use, Buffer::Footprint(bytes));
  }
  auto fresh = room->Allocate(bytes, Fill::kNothing);
  if (!fresh.ok()) return Annotated(fresh.status(), home_->name());
  BufferPtr old = home_->data(*hold_, slot);
  // A step reads the weight from one array and writes it to another (RangeStep), but updates every
  // other slot in place, so only those need a copy.
  if (slot == Slot::kWeight)
    old_weight_ = std::move(old);
  else
    std::memcpy((*fresh)->data(), old->data(), bytes);
  buffer(slot) = *std::move(fresh);
  rooms_[SlotIndex(slot)] = *std::move(room);
  return absl::OkStatus();
}

void WorkingSlots::Keep(int64_t version) {
  // If the disk refuses a slot, SlotHome has its contents in memory.
  for (size_t i = 0; i < kStoredSlotCount; ++i)
    if (buffers_[i])
      (void)home_->Keep(*hold_, static_cast<Slot>(i), version, {std::move(buffers_[i])},
                        std::move(rooms_[i]));
}

kernels::RangeStep WorkingSlots::StepOf(const ShardUpdate& update, const TensorOptimizer& optimizer,
                                        const ShardInfo& shard, kernels::TypedSpan gradient) const {
  kernels::RangeStep step;
  step.optimizer = optimizer.optimizer;
  step.scalars = update.scalars.span();
  step.gradient = gradient;
  step.new_weight = as<uint16_t>(Slot::kWeight).data();
  step.weight = old_weight_ ? std::as_const(*old_weight_).as<uint16_t>().data() : step.new_weight;
  step.remainder = as<uint8_t>(Slot::kRemainder).data();
  step.master = optimizer.master;
  step.format = optimizer.state;
  step.rounding = optimizer.rounding;
  for (size_t i = 0; i < optimizer.optimizer->states.size(); ++i) {
    const Slot values = StateSlot(optimizer.optimizer->states[i].name);
    step.states[i] = {as<uint8_t>(values).data(), as<float>(AbsmaxSlot(values)).data()};
  }
  step.random = update.random;
  step.first_block = shard.range().begin / kernels::kQuantBlock;
  // Finish sets the scalars and the input that the pass computed.
  if (update.pass) update.pass->pass->Finish(shard.range().begin, &step);
  return step;
}

}  // namespace orlop::server
