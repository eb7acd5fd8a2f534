#include "server/tiers/slot_home.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "proto/status.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/tiers/served_hashes.h"
#include "server/tiers/tier.h"
#include "server/tiers/window.h"

namespace orlop::server {
namespace {

// Fills a zero-filled buffer with the initial byte of a format. An error is passed on.
absl::StatusOr<BufferPtr> Initial(const SlotFormat& format, absl::StatusOr<BufferPtr> buffer) {
  if (buffer.ok() && format.initial_byte != 0)
    std::memset((*buffer)->data(), format.initial_byte, (*buffer)->size());
  return buffer;
}

}  // namespace

// ---- SlotHold ----

SlotHold::SlotHold(SlotHome* home) : home_(home) { home_->Hold(); }
std::optional<SlotHold> SlotHold::Try(SlotHome* home) {
  if (!home->TryHold()) return std::nullopt;
  return SlotHold(home, Held());
}
SlotHold::SlotHold(SlotHold&& other) noexcept : home_(std::exchange(other.home_, nullptr)) {}
SlotHold::~SlotHold() {
  if (home_ != nullptr) home_->Release();
}

void SlotHome::Hold() {
  MutexLock lock(&mutex_);
  while (held_) released_.Wait(&mutex_);
  held_ = true;
}
bool SlotHome::TryHold() {
  MutexLock lock(&mutex_);
  return !std::exchange(held_, true);
}
void SlotHome::Release() {
  MutexLock lock(&mutex_);
  held_ = changing_ = false;
  hashes_ = std::make_shared<ServedHashes>();
  released_.SignalAll();
}

// ---- Without a hold ----

SlotHome::SlotHome(Tiers* tiers, SlotKey key, std::string name, uint64_t element_count)
    : tiers_(tiers), key_(std::move(key)), name_(std::move(name)), element_count_(element_count) {}

SlotHome::~SlotHome() {
  const SlotHold hold(this);
  for (size_t i = 0; i < kStoredSlotCount; ++i) Clear(hold, static_cast<Slot>(i));
}

SlotKey SlotHome::Key(Slot slot) const { return {key_.job, key_.shard, slot, key_.tensor}; }

void SlotHome::Inspect(absl::FunctionRef<void(const View&)> look) const {
  MutexLock lock(&mutex_);
  look({version_, changing_, slots_, hashes_});
}

int64_t SlotHome::version() const {
  MutexLock lock(&mutex_);
  return version_;
}

bool SlotHome::held() const {
  MutexLock lock(&mutex_);
  return held_;
}

SlotFormats SlotHome::formats() const {
  SlotFormats formats;
  MutexLock lock(&mutex_);
  for (size_t i = 0; i < kStoredSlotCount; ++i) formats[i] = slots_[i].format;
  return formats;
}

Tier SlotHome::tier(Slot slot) const {
  MutexLock lock(&mutex_);
  return state(slot).tier;
}

bool SlotHome::is_unplaced(Slot slot) const {
  MutexLock lock(&mutex_);
  return state(slot).is_unplaced;
}

uint64_t SlotHome::FootprintBytes() const {
  uint64_t bytes = 0;
  MutexLock lock(&mutex_);
  for (const SlotState& slot : slots_) bytes += Footprint(slot);
  return bytes;
}

uint64_t SlotHome::SpilledFootprintBytes() const {
  uint64_t bytes = 0;
  MutexLock lock(&mutex_);
  for (const SlotState& slot : slots_)
    if (slot.tier == Tier::kNvme) bytes += Footprint(slot);
  return bytes;
}

uint64_t SlotHome::ResidentBytes() const {
  uint64_t bytes = 0;
  MutexLock lock(&mutex_);
  for (const SlotState& slot : slots_)
    if (slot.tier == Tier::kDram) bytes += slot.room.reserved_bytes();
  return bytes;
}

absl::StatusOr<BufferPtr> SlotHome::Read(Slot slot, const SlotBytes& bytes) const {
  if (bytes.data || !bytes.spilled) return bytes.data;
  auto buffer = NewMessage(bytes.spilled->bytes);
  if (!buffer.ok()) return buffer.status();
  absl::Status restored =
      tiers_->Restore(Key(slot), *bytes.spilled, {(*buffer)->data(), (*buffer)->size()});
  if (!restored.ok()) return restored;
  return buffer;
}

absl::StatusOr<BufferPtr> SlotHome::NewMessage(uint64_t bytes) const {
  return tiers_->NewBuffer({Tier::kDram, key_.job, "messages"}, bytes);
}

absl::StatusOr<BufferPtr> SlotHome::FirstBuffer(Slot slot) {
  MutexLock lock(&mutex_);
  if (held_) return absl::UnavailableError(absl::StrCat(name_, ": is being applied"));
  SlotState& first = state(slot);
  if (first.tier != Tier::kDram || first.bytes.data || first.bytes.spilled) return BufferPtr();
  return Initial(first.format, first.room.Allocate(Bytes(first))).value_or(nullptr);
}

// ---- Tiers of slots ----

SlotState SlotHome::Exchange(const SlotHold&, Slot slot, SlotState fresh) {
  MutexLock lock(&mutex_);
  std::swap(state(slot), fresh);
  return fresh;
}

// Returns whether a spill of the slot frees memory. It would not if a reader keeps the buffer, or
// if a LOAD has a buffer in the slot's room.
bool SlotHome::MaySpill(const SlotState& state) const {
  if (!state.format.exists() || state.is_unplaced || state.tier == Tier::kNvme) return false;
  return state.bytes.data ? state.bytes.data.use_count() == 1 : state.room.used_bytes() == 0;
}

absl::StatusOr<uint64_t> SlotHome::Spill(Slot slot) {
  const std::optional<SlotHold> hold = SlotHold::Try(this);
  if (!hold) return 0;
  SlotFormat format;
  BufferPtr data;
  std::optional<SpilledSlot> spilled;
  {
    MutexLock lock(&mutex_);
    if (!MaySpill(state(slot))) return 0;
    format = state(slot).format;
    data = state(slot).bytes.data;
    spilled = state(slot).bytes.spilled;
  }
  const uint64_t bytes = format.Bytes(element_count_);
  auto disk = tiers_->accountant().Reserve(RoomOf(Tier::kNvme, slot), bytes);
  if (!disk.ok()) return disk.status();
  if (data != nullptr) {
    auto written = tiers_->Spill(Key(slot), version(), data->bytes(), nullptr);
    if (!written.ok()) return written.status();
    spilled = *written;
  }
  if (spilled)
    if (absl::Status used = disk->SetUsed(bytes); !used.ok()) return used;
  data.reset();
  const SlotState before =
      Exchange(*hold, slot, {format, Tier::kNvme, *std::move(disk), {nullptr, spilled}});
  return before.room.reserved_bytes();
}

absl::StatusOr<uint64_t> SlotHome::BringBack(Slot slot, uint64_t most_bytes) {
  const std::optional<SlotHold> hold = SlotHold::Try(this);
  if (!hold) return 0;
  SlotFormat format;
  std::optional<SpilledSlot> spilled;
  {
    MutexLock lock(&mutex_);
    const SlotState& from = state(slot);
    if (!from.format.exists() || from.tier != Tier::kNvme || from.bytes.data) return 0;
    format = from.format;
    spilled = from.bytes.spilled;
  }
  const uint64_t bytes = format.Bytes(element_count_);
  if (Buffer::Footprint(bytes) > most_bytes) return 0;
  auto room = tiers_->accountant().Reserve(RoomOf(Tier::kDram, slot), Buffer::Footprint(bytes));
  if (!room.ok()) return 0;
  SlotBytes brought;
  if (spilled) {
    auto buffer = room->Allocate(bytes, Fill::kNothing);
    if (!buffer.ok()) return 0;
    absl::Status restored =
        tiers_->Restore(Key(slot), *spilled, {(*buffer)->data(), (*buffer)->size()});
    if (!restored.ok()) return restored;
    brought.data = *std::move(buffer);
  }
  const uint64_t reserved = room->reserved_bytes();
  (void)Exchange(*hold, slot, {format, Tier::kDram, *std::move(room), std::move(brought)});
  if (spilled) (void)tiers_->Erase(Key(slot), *spilled);  // else the next start erases the value
  return reserved;
}

void SlotHome::WriteBack() {
  const std::optional<SlotHold> hold = SlotHold::Try(this);
  if (!hold) return;
  for (size_t i = 0; i < kStoredSlotCount; ++i) {
    const Slot slot = static_cast<Slot>(i);
    BufferPtr stranded;
    {
      MutexLock lock(&mutex_);
      if (slots_[i].tier == Tier::kNvme) stranded = slots_[i].bytes.data;
    }
    if (stranded && !Keep(*hold, slot, version(), {std::move(stranded)}).ok()) return;
  }
}

// ---- Bytes, for the owner of a hold ----

BufferPtr SlotHome::data(const SlotHold&, Slot slot) const {
  MutexLock lock(&mutex_);
  return state(slot).bytes.data;
}

bool SlotHome::has_contents(const SlotHold&, Slot slot) const {
  MutexLock lock(&mutex_);
  return state(slot).bytes.data || state(slot).bytes.spilled;
}

bool SlotHome::is_shared(const SlotHold&, Slot slot) const {
  MutexLock lock(&mutex_);
  return state(slot).bytes.data.use_count() > 1;
}

absl::StatusOr<BufferPtr> SlotHome::Read(const SlotHold&, Slot slot) const {
  SlotBytes bytes;
  {
    MutexLock lock(&mutex_);
    bytes = state(slot).bytes;
  }
  return Read(slot, bytes);
}

absl::StatusOr<BufferPtr> SlotHome::Bring(const SlotHold&, Slot slot, Window* window) {
  if (absl::Status room = RoomBesideReader(slot); !room.ok()) return Annotated(room, name_);
  SlotFormat format;
  std::optional<SpilledSlot> spilled;
  absl::StatusOr<BufferPtr> buffer;
  {
    MutexLock lock(&mutex_);
    SlotState& from = state(slot);
    format = from.format;
    spilled = from.bytes.spilled;
    const Fill fill = spilled ? Fill::kNothing : Fill::kZeros;
    buffer = from.tier == Tier::kDram ? from.room.Allocate(Bytes(from), fill)
                                      : window->Allocate(Bytes(from), fill);
  }
  if (!buffer.ok()) return Annotated(buffer.status(), name_);
  if (!spilled) return Initial(format, std::move(buffer));
  absl::Status restored =
      tiers_->Restore(Key(slot), *spilled, {(*buffer)->data(), (*buffer)->size()});
  if (!restored.ok()) return restored;
  return buffer;
}

void SlotHome::Clear(const SlotHold&, Slot slot) {
  SlotBytes old;
  {
    MutexLock lock(&mutex_);
    std::swap(old, state(slot).bytes);
  }
  if (old.spilled)  // after an error, the next start erases the value
    (void)tiers_->Erase(Key(slot), *old.spilled);
}

absl::StatusOr<BufferPtr> SlotHome::Replace(const SlotHold& hold, Slot slot) {
  Clear(hold, slot);
  uint64_t bytes;
  Tier tier;
  {
    MutexLock lock(&mutex_);
    bytes = Bytes(state(slot));
    tier = state(slot).tier;
  }
  if (tier == Tier::kNvme) return NewMessage(bytes);
  if (absl::Status room = RoomBesideReader(slot); !room.ok()) return room;
  MutexLock lock(&mutex_);
  return state(slot).room.Allocate(bytes);
}

// Gives a slot of tier DRAM new room if a reader keeps an old buffer in the room that it has.
absl::Status SlotHome::RoomBesideReader(Slot slot) {
  uint64_t bytes;
  {
    MutexLock lock(&mutex_);
    const SlotState& old = state(slot);
    if (old.tier != Tier::kDram || old.bytes.data || old.room.used_bytes() == 0)
      return absl::OkStatus();
    bytes = Bytes(old);
  }
  auto room = tiers_->Reserve(RoomOf(Tier::kDram, slot), Buffer::Footprint(bytes));
  if (!room.ok()) return room.status();
  MutexLock lock(&mutex_);
  state(slot).room = *std::move(room);
  return absl::OkStatus();
}

void SlotHome::BeginChange(const SlotHold&) {
  MutexLock lock(&mutex_);
  changing_ = true;
}

absl::Status SlotHome::Keep(const SlotHold&, Slot slot, int64_t version, SlotBytes bytes,
                            Reservation room) {
  Tier tier;
  std::optional<SpilledSlot> old;
  {
    MutexLock lock(&mutex_);
    tier = state(slot).tier;
    old = state(slot).bytes.spilled;
  }
  absl::Status status;
  if (bytes.data && tier == Tier::kNvme) {
    auto written = tiers_->Spill(Key(slot), version, bytes.data->bytes(), old ? &*old : nullptr);
    status = written.status();
    if (written.ok()) bytes = {nullptr, *written};
    if (written.ok()) old.reset();  // Tiers::Spill has erased it
  }
  const bool is_on_disk = bytes.spilled.has_value();
  {
    MutexLock lock(&mutex_);
    SlotState& kept = state(slot);
    if (is_on_disk) {
      if (tier == Tier::kNvme) (void)kept.room.SetUsed(bytes.spilled->bytes);
      kept.bytes = std::move(bytes);
    } else {
      kept.bytes.data = std::move(bytes.data);
      if (tier == Tier::kDram && room.reserved_bytes() > 0) {
        kept.room = std::move(room);
        kept.is_unplaced = false;
      }
      if (tier == Tier::kDram) kept.bytes.spilled.reset();
    }
  }
  const bool is_replaced = is_on_disk || tier == Tier::kDram;
  if (is_replaced && old)  // after an error, the next start erases the value
    (void)tiers_->Erase(Key(slot), *old);
  return status;
}

void SlotHome::set_version(const SlotHold&, int64_t version) {
  MutexLock lock(&mutex_);
  version_ = version;
}

}  // namespace orlop::server
