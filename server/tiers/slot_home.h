// Where the slots of one shard are: the room of each, in memory or on disk, and its bytes. Nothing
// here knows what the bytes mean.
//
// Whoever reads or changes slots over several calls holds them (SlotHold): an apply, a pass, a
// flush, a spill. Others only look at them (Inspect) and keep buffers that they found: a buffer
// that somebody else keeps is never written again.
//   Threads  all methods are safe from any thread. Methods that take a SlotHold are called by its
//            owner alone.
//   Locks    the lock of this class is taken last but for the accountant's; no call of it waits for
//            the disk with the lock held.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/tiers/tier.h"
#include "server/tiers/window.h"

namespace orlop::server {

// A slot's bytes: in `data`, or on disk in `spilled`, or (neither) all equal to the format's
// initial byte. If both are set, `spilled` is an older version.
struct SlotBytes {
  BufferPtr data;
  std::optional<SpilledSlot> spilled;
};

struct SlotState {
  SlotFormat format;
  Tier tier = Tier::kDram;  // where its room is
  Reservation room;
  SlotBytes bytes;  // `data` of an NVME slot: only while the disk refuses to take it back
};

class SlotHome;

// Exclusive work on the slots of one shard, until destroyed.
class SlotHold {
 public:
  // Waits until nobody else holds the slots.
  explicit SlotHold(SlotHome* home);
  // Does not wait: nullopt if somebody holds them.
  static std::optional<SlotHold> Try(SlotHome* home);
  SlotHold(SlotHold&& other) noexcept;
  SlotHold& operator=(SlotHold&&) = delete;
  ~SlotHold();

 private:
  struct Held {};
  SlotHold(SlotHome* home, Held) : home_(home) {}
  SlotHome* home_;
};

class SlotHome {
 public:
  // `key` names the shard; its slot is not read. `name` is the shard in messages. `tiers` outlives
  // this.
  SlotHome(Tiers* tiers, SlotKey key, std::string name, uint64_t element_count);
  ~SlotHome();  // erases what is on disk

  int32_t shard() const { return key_.shard; }  // its id
  const std::string& name() const { return name_; }
  uint64_t element_count() const { return element_count_; }
  Tiers* tiers() const { return tiers_; }
  SlotKey Key(Slot slot) const;
  Use RoomOf(Tier tier, Slot slot) const { return {tier, key_.job, SlotName(slot)}; }

  // ---- Seen without a hold ----
  struct View {
    int64_t version;  // of the bytes; -1: none are committed
    bool changing;    // the version is being replaced: it can no longer be read
    const std::array<SlotState, kStoredSlotCount>& slots;
  };
  // Calls `look` once, with the lock held: it must not call this object, and should keep of a slot
  // only what it needs, as a buffer that is kept is not written in place.
  void Inspect(absl::FunctionRef<void(const View&)> look) const;
  int64_t version() const;
  bool held() const;
  SlotFormats formats() const;
  Tier tier(Slot slot) const;
  // What all slots take in memory: what a step of the shard needs; and those that are on disk.
  uint64_t FootprintBytes() const;
  uint64_t SpilledFootprintBytes() const;
  // What is reserved in memory for the slots that are there.
  uint64_t ResidentBytes() const;
  // The bytes of a slot as somebody saw them: restored from disk into memory of "messages" if they
  // are there. Null: all equal to the initial byte. Reads the disk.
  //   Status  DataLoss (damaged, or replaced since), ResourceExhausted
  absl::StatusOr<BufferPtr> Read(Slot slot, const SlotBytes& bytes) const;
  // A buffer for bytes on their way, in memory of "messages". May wait for the disk.
  //   Status  ResourceExhausted
  absl::StatusOr<BufferPtr> NewMessage(uint64_t bytes) const;
  // For the first contents of a slot: a buffer in the slot's own room, every byte the initial one.
  // Null: the slot has contents, is on disk, or its room is in use. Does not wait.
  //   Status  Unavailable (somebody holds the slots)
  absl::StatusOr<BufferPtr> FirstBuffer(Slot slot);

  // ---- Where slots are ----
  // Replaces all there is of a slot and returns what was there.
  SlotState Exchange(const SlotHold& hold, Slot slot, SlotState state);
  // Moves a slot to disk and returns the bytes of memory that this gave back: 0 if the slots are
  // held, or a reader or a LOAD uses the slot. Writes the disk.
  //   Status  ResourceExhausted, DataLoss: the slot stays in memory
  absl::StatusOr<uint64_t> Spill(Slot slot);
  // Writes slots to disk that a failing disk left in memory, unless the slots are held.
  void WriteBack();

  // ---- Bytes, for who holds the slots ----
  BufferPtr data(const SlotHold& hold, Slot slot) const;
  // Whether a slot was ever written.
  bool has_contents(const SlotHold& hold, Slot slot) const;
  // Whether somebody else keeps the buffer of a slot.
  bool is_shared(const SlotHold& hold, Slot slot) const;
  // As Read, of what is there.
  absl::StatusOr<BufferPtr> Read(const SlotHold& hold, Slot slot) const;
  // A slot that has no bytes in memory: initial bytes in its own room, or those of the disk in the
  // window, which the caller has leased. Changes nothing. Reads the disk.
  //   Status  DataLoss, ResourceExhausted
  absl::StatusOr<BufferPtr> Bring(const SlotHold& hold, Slot slot, Window* window);
  // Drops the bytes of a slot. Erases them on disk.
  void Clear(const SlotHold& hold, Slot slot);
  // Drops the bytes of a slot and returns a buffer for new ones, for Keep: in the slot's own room,
  // or in memory of "messages" if that is on disk.
  //   Status  ResourceExhausted
  absl::StatusOr<BufferPtr> Replace(const SlotHold& hold, Slot slot);
  // From now on readers do not get the present version, until the hold ends.
  void BeginChange(const SlotHold& hold);
  // Makes `bytes` the contents of a slot. `version` is noted on disk. If the slot lives on disk,
  // `data` is written there, replacing what was; `spilled` is there already. `room` is of `data`,
  // if that is not in the slot's own room.
  //   Status  as Spill: the contents are in memory then, and count
  absl::Status Keep(const SlotHold& hold, Slot slot, int64_t version, SlotBytes bytes,
                    Reservation room = {});
  void set_version(const SlotHold& hold, int64_t version);

 private:
  friend class SlotHold;
  bool TryHold();
  void Hold();
  void Release();
  uint64_t Bytes(const SlotState& state) const { return state.format.Bytes(element_count_); }
  uint64_t Footprint(const SlotState& state) const {
    return state.format.exists() ? Buffer::Footprint(Bytes(state)) : 0;
  }
  SlotState& state(Slot slot) REQUIRES(mutex_) { return slots_[SlotIndex(slot)]; }
  const SlotState& state(Slot slot) const REQUIRES(mutex_) { return slots_[SlotIndex(slot)]; }
  bool MaySpill(const SlotState& state) const;

  Tiers* const tiers_;
  const SlotKey key_;
  const std::string name_;
  const uint64_t element_count_;
  mutable Mutex mutex_;
  CondVar released_;
  bool held_ GUARDED_BY(mutex_) = false;
  bool changing_ GUARDED_BY(mutex_) = false;
  int64_t version_ GUARDED_BY(mutex_) = -1;
  std::array<SlotState, kStoredSlotCount> slots_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
