#include "server/tiers/residency.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/tiers/slot_home.h"
#include "server/tiers/tier.h"

namespace orlop::server {
namespace {

std::vector<int32_t> ShardsOf(const std::vector<SlotHome*>& homes) {
  std::vector<int32_t> shards;
  shards.reserve(homes.size());
  for (const SlotHome* home : homes) shards.push_back(home->shard());
  return shards;
}

}  // namespace

Residency::Residency(std::string job, Tiers* tiers, std::vector<SlotHome*> homes)
    : job_(std::move(job)),
      tiers_(tiers),
      homes_(std::move(homes)),
      order_(ShardsOf(homes_)),
      window_(job_, &tiers->accountant()) {
  tiers_->Register(this);
}

Residency::~Residency() { tiers_->Unregister(this); }

// ---- Room ----

uint64_t Residency::WindowToOpen(uint64_t shard_bytes) const {
  if (!tiers_->can_spill()) return 0;
  const uint64_t bytes = std::max(shard_bytes, WindowBytes());
  return bytes - std::min(bytes, window_.memory_bytes());
}

absl::Status Residency::Place(SlotHome* home, Slot slot, const SlotFormat& format, Tier first) {
  SlotState state{format};
  if (format.exists()) {
    // A job without a window makes other jobs spill for the slot. Its own slots stay (`keeps`), or
    // this call would move out a slot that the last call has placed.
    const uint64_t bytes = format.Bytes(home->element_count());
    const Use use = home->RoomOf(Tier::kDram, slot);
    absl::StatusOr<Reservation> room = absl::ResourceExhaustedError("to be on disk");
    if (first == Tier::kDram || !tiers_->can_spill())
      room = window_.memory_bytes() > 0
                 ? tiers_->accountant().Reserve(use, Buffer::Footprint(bytes))
                 : tiers_->Reserve(use, Buffer::Footprint(bytes), /*keeps=*/this);
    if (!room.ok()) {
      if (!tiers_->can_spill()) return room.status();
      // WindowBytes adds up the formats of the slots, so the slot gets its format first.
      (void)home->Exchange(SlotHold(home), slot, {format});
      if (absl::Status window = OpenWindow(); !window.ok()) return window;
      state.tier = Tier::kNvme;
      room = tiers_->accountant().Reserve(home->RoomOf(Tier::kNvme, slot), bytes);
      if (!room.ok()) return room.status();
    }
    state.room = *std::move(room);
  }
  (void)home->Exchange(SlotHold(home), slot, std::move(state));
  return absl::OkStatus();
}

// The budget has to hold what everybody else has reserved, `other_bytes`, and slots of this job:
// all of them if nothing can spill, otherwise the window.
absl::Status Residency::WithSmallestBudget(const absl::Status& status, uint64_t resident_bytes,
                                           uint64_t other_bytes) const {
  uint64_t own = 0;
  for (const SlotHome* home : homes_) own += home->ResidentBytes();
  const uint64_t others = tiers_->accountant().reserved_bytes(Tier::kDram) - own;
  const uint64_t need =
      others + other_bytes + (tiers_->can_spill() ? WindowBytes() : resident_bytes);
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::BUDGET);
  detail.set_limit(absl::StrCat(need));
  return Annotated(
      status, absl::StrCat("job '", job_, "' needs a memory budget of at least ", need, " bytes"),
      detail);
}

absl::Status Residency::CheckDisk() const {
  const uint64_t bytes = window_.disk_bytes();
  return bytes == 0 ? absl::OkStatus() : tiers_->CheckDisk(job_, bytes);
}

// ---- The window ----

// Returns the memory that the slots of the largest shard take: an apply of that shard needs this
// much if all of its slots are spilled.
uint64_t Residency::WindowBytes() const {
  uint64_t largest = 0;
  for (const SlotHome* home : homes_) largest = std::max(largest, home->FootprintBytes());
  return largest;
}

// Reserves the window. If there is too little free memory, it first spills slots of this job.
absl::Status Residency::OpenWindow() {
  const uint64_t bytes = WindowBytes();
  if (window_.Grow(bytes).ok()) return absl::OkStatus();
  SpillSome(bytes);
  return window_.Grow(bytes);
}

// Reserves the window unless it has `bytes` already. SpillCold may have spilled slots and then
// found no memory for the window.
absl::Status Residency::EnsureWindow(uint64_t bytes) {
  if (window_.memory_bytes() >= bytes || OpenWindow().ok()) return absl::OkStatus();
  // The reservation is dropped at once: it only makes other jobs spill. If somebody else takes that
  // memory first, this call fails and a later one tries again.
  (void)tiers_->Reserve(window_.memory_use(), WindowBytes());
  return OpenWindow();
}

absl::StatusOr<Window::Lease> Residency::Lease(const SlotHome& home) {
  const uint64_t bytes = home.SpilledFootprintBytes();
  if (bytes == 0) return Window::Lease();
  Window::Lease lease(&window_);
  if (absl::Status room = EnsureWindow(bytes); !room.ok()) return Annotated(room, home.name());
  return lease;
}

absl::StatusOr<BufferPtr> Residency::Bring(SlotHome* home, const SlotHold& hold, Slot slot) {
  auto buffer = home->Bring(hold, slot, &window_);
  if (!absl::IsResourceExhausted(buffer.status())) return buffer;
  WriteBackStranded();
  return home->Bring(hold, slot, &window_);
}

void Residency::WriteBackStranded() {
  for (SlotHome* home : homes_) home->WriteBack();
}

// ---- Spilling ----

uint64_t Residency::SpillCold(uint64_t wanted_bytes) {
  const uint64_t window = WindowBytes();
  const uint64_t missing = window - std::min(window, window_.memory_bytes());
  if (missing == 0) return SpillSome(wanted_bytes);
  if (!SpillPays(missing) || !window_.GrowOnDisk(window).ok()) return 0;
  // The first spill of a job also frees memory for its window, which does not count as freed. If
  // the window cannot be reserved yet, the next spill or apply reserves it.
  const uint64_t freed = SpillSome(wanted_bytes + missing);
  return window_.Grow(window).ok() ? freed - std::min(freed, missing) : freed;
}

// Returns whether a spill is worth `window_bytes` of window that are not reserved yet: more than
// that is in memory, or slots are spilled already and need the window anyway.
bool Residency::SpillPays(uint64_t window_bytes) const {
  uint64_t resident_bytes = 0;
  for (const SlotHome* home : homes_) {
    if (home->SpilledFootprintBytes() > 0) return true;
    resident_bytes += home->ResidentBytes();
  }
  return resident_bytes > window_bytes;
}

uint64_t Residency::SpillSome(uint64_t wanted_bytes) {
  uint64_t freed = 0;
  ForEachColdest([&](SlotHome* home, Slot slot) {
    if (freed >= wanted_bytes) return false;
    const auto bytes = home->Spill(slot);
    freed += bytes.value_or(0);
    return bytes.ok();  // after an error of the disk, nothing more is spilled
  });
  return freed;
}

uint64_t Residency::BringBack(uint64_t most_bytes) {
  std::vector<std::pair<SlotHome*, Slot>> warmest;
  ForEachColdest([&](SlotHome* home, Slot slot) {
    warmest.emplace_back(home, slot);
    return true;
  });
  std::ranges::reverse(warmest);
  uint64_t brought = 0;
  for (const auto& [home, slot] : warmest) {
    const auto bytes = home->BringBack(slot, most_bytes - brought);
    if (!bytes.ok()) break;  // an error of the disk, which the next apply will tell
    brought += *bytes;
  }
  return brought;
}

void Residency::ForEachColdest(absl::FunctionRef<bool(SlotHome*, Slot)> visit) const {
  std::vector<SlotHome*> coldest;
  for (int32_t shard : order_.Next())
    coldest.push_back(*std::ranges::lower_bound(homes_, shard, {}, &SlotHome::shard));
  std::ranges::reverse(coldest);
  for (SlotHome* home : coldest)
    for (size_t i = SlotIndex(Slot::kWeight) + 1; i < kStoredSlotCount; ++i)
      if (!visit(home, static_cast<Slot>(i))) return;
  for (SlotHome* home : coldest)
    if (!visit(home, Slot::kWeight)) return;
}

}  // namespace orlop::server
