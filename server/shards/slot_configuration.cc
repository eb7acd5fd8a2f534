#include "server/shards/slot_configuration.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/shard.h"
#include "server/tiers/slot_home.h"

namespace orlop::server {

SlotFormat ConfiguredFormat(const Shard& shard, const std::vector<TensorOptimizer>& optimizers,
                            Slot slot) {
  return FormatOf(*shard.info.tensor, optimizers[shard.info.owned.tensor], slot,
                  shard.info.range());
}

void LeaveUnplaced(Shard* shard, Slot slot, const SlotFormat& format) {
  SlotState state{format};
  state.is_unplaced = format.exists();
  (void)shard->slots.Exchange(SlotHold(&shard->slots), slot, std::move(state));
}

uint64_t ConfiguredBytes(const std::vector<std::unique_ptr<Shard>>& shards,
                         const std::vector<TensorOptimizer>& optimizers) {
  uint64_t bytes = 0;
  for (const auto& shard : shards) {
    const bool is_unplaced = shard->slots.is_unplaced(Slot::kWeight);
    for (size_t i = is_unplaced ? SlotIndex(kFirstState) : 0; i < kStoredSlotCount; ++i)
      bytes += Buffer::Footprint(
          ConfiguredFormat(*shard, optimizers, static_cast<Slot>(i)).Bytes(shard->info.count()));
  }
  return bytes;
}

absl::Status SlotChange::Place(const std::vector<TensorOptimizer>& optimizers) {
  std::vector<std::pair<Shard*, Slot>> empty;
  for (const auto& shard : *shards_) {
    const SlotFormats formats = shard->slots.formats();
    for (size_t i = SlotIndex(Slot::kRemainder); i < kStoredSlotCount; ++i) {
      const Slot slot = static_cast<Slot>(i);
      if (formats[i] == ConfiguredFormat(*shard, optimizers, slot)) continue;
      SlotState old = shard->slots.Exchange(SlotHold(&shard->slots), slot, {});
      if (old.bytes.data || old.bytes.spilled)
        replaced_.push_back({shard.get(), slot, std::move(old)});
      empty.emplace_back(shard.get(), slot);
    }
  }
  for (const auto& [shard, slot] : empty) {
    const SlotFormat format = ConfiguredFormat(*shard, optimizers, slot);
    if (slot < kFirstState && shard->slots.is_unplaced(Slot::kWeight)) {
      LeaveUnplaced(shard, slot, format);
      continue;
    }
    absl::Status placed = residency_->Place(&shard->slots, slot, format);
    if (!placed.ok()) return placed;
  }
  return absl::OkStatus();
}

absl::Status SlotChange::Undo(const std::vector<TensorOptimizer>& before) {
  for (Replaced& old : std::exchange(replaced_, {}))
    (void)old.shard->slots.Exchange(SlotHold(&old.shard->slots), old.slot, std::move(old.state));
  return Place(before);  // the old slots fit again, unless another job takes the room meanwhile
}

void SlotChange::Finish() {
  for (const Replaced& old : std::exchange(replaced_, {}))
    if (old.state.bytes.spilled)  // if this fails, the next start of the server erases the bytes
      (void)residency_->tiers()->Erase(old.shard->slots.Key(old.slot), *old.state.bytes.spilled);
}

}  // namespace orlop::server
