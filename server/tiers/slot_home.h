// A SlotHome has the slots of one shard: for each slot its format, its tier (in memory or on disk),
// its room (the reservation of its bytes) and its bytes. It does not interpret the bytes.
//
// An apply, a pass, a flush or a spill needs the slots over several calls, so it holds them
// (SlotHold). A reader only looks at them (Inspect) and keeps the buffers that it finds. A buffer
// that a reader keeps is not written in place: the apply writes another one.
//   Threads  All methods are safe from any thread. Only the owner of a SlotHold may call the
//            methods that take one.
//   Locks    Under the lock of this class, only the accountant's and that of a Window are taken. No
//            method waits for the disk with the lock held.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/tiers/served_hashes.h"
#include "server/tiers/tier.h"
#include "server/tiers/window.h"

namespace orlop::server {

// The bytes of a slot are in `data`, or on disk as `spilled`. If neither is set, every byte is the
// initial byte of the format. If both are set, `spilled` is an older version. The bytes of a slot
// of tier DRAM are on disk if a LOAD was written there before the slot came back. Its next step
// reads them into its room, and a spill leaves them where they are.
struct SlotBytes {
  BufferPtr data;
  std::optional<SpilledSlot> spilled;
};

// A SlotState is all that a SlotHome knows of one slot.
struct SlotState {
  SlotFormat format;
  Tier tier = Tier::kDram;  // the tier of `room`
  Reservation room;
  SlotBytes bytes;  // at tier NVME, `data` is set only if its write to the disk has failed
  // It has a format and no room: nothing has set the tensor (Tensor::may_be_unset), and no LOAD is
  // about to.
  bool is_unplaced = false;
};

class SlotHome;

// A SlotHold is the exclusive right to work on the slots of one shard, until it is destroyed.
class SlotHold {
 public:
  // Waits until nobody else holds the slots. `home` outlives the hold.
  explicit SlotHold(SlotHome* home);
  // Does not wait. Returns nullopt if somebody holds the slots.
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
  // `key` names the shard; its `slot` is ignored. `name` names the shard in messages. The shard has
  // `element_count` elements. `tiers` outlives the object.
  SlotHome(Tiers* tiers, SlotKey key, std::string name, uint64_t element_count);
  ~SlotHome();  // waits until nobody holds the slots, and erases the spilled ones on disk

  int32_t shard() const { return key_.shard; }  // its id
  const std::string& name() const { return name_; }
  uint64_t element_count() const { return element_count_; }
  Tiers* tiers() const { return tiers_; }
  SlotKey Key(Slot slot) const;
  // Returns the use that the room of a slot is reserved for.
  Use RoomOf(Tier tier, Slot slot) const { return {tier, key_.job, SlotName(slot)}; }

  // ---- Without a hold ----
  struct View {
    int64_t version;  // of the bytes; -1: no step was applied yet
    bool changing;    // an apply is replacing the version, which can no longer be read
    const std::array<SlotState, kStoredSlotCount>& slots;
    const std::shared_ptr<ServedHashes>& hashes;  // of the bytes
  };
  // Calls `look` once with the lock held, so `look` must not call this object. It should copy only
  // the BufferPtr that it needs: an apply needs more memory for every buffer that a reader keeps.
  void Inspect(absl::FunctionRef<void(const View&)> look) const;
  int64_t version() const;
  bool held() const;  // somebody holds the slots now
  SlotFormats formats() const;
  Tier tier(Slot slot) const;
  bool is_unplaced(Slot slot) const;
  // Return the memory that slots take if they are in memory: all slots, which is what a step of the
  // shard needs, and those that are on disk.
  uint64_t FootprintBytes() const;
  uint64_t SpilledFootprintBytes() const;
  // Returns the memory that is reserved for the slots that are in memory.
  uint64_t ResidentBytes() const;
  // Returns a buffer with `bytes`, which Inspect has shown for a slot; null if every byte is the
  // initial byte. If the bytes are on disk, they are read into a new buffer, which is counted as
  // "messages". May wait for the disk.
  //   Status  DataLoss (the value on disk is damaged, or was replaced since), ResourceExhausted
  absl::StatusOr<BufferPtr> Read(Slot slot, const SlotBytes& bytes) const;
  // Returns a zero-filled buffer that is counted as "messages": for bytes that are copied elsewhere
  // soon. May wait for the disk.
  //   Status  ResourceExhausted
  absl::StatusOr<BufferPtr> NewMessage(uint64_t bytes) const;
  // Returns a buffer in the slot's own room for its first contents, with every byte the initial
  // one. Returns null if the slot has bytes in memory, is on disk, or has too little room left.
  // Does not wait.
  //   Status  Unavailable: somebody holds the slots
  absl::StatusOr<BufferPtr> FirstBuffer(Slot slot);

  // ---- Tiers of slots ----
  // Replaces the whole state of a slot and returns the old one.
  SlotState Exchange(const SlotHold& hold, Slot slot, SlotState state);
  // Moves a slot to disk and returns the bytes of memory that this gave back. Does nothing and
  // returns 0 if somebody holds the slots, if a reader or a LOAD uses the slot, or if the slot is
  // not in memory. Waits for the disk, but never for a hold.
  //   Status  ResourceExhausted, DataLoss: the slot stays in memory
  absl::StatusOr<uint64_t> Spill(Slot slot);
  // Moves a slot back into memory, if it takes at most `most_bytes` and that much is free, and
  // returns the bytes that it takes there. Does nothing and returns 0 if not, or if somebody holds
  // the slots. Waits for the disk, but never for a hold.
  //   Status  DataLoss: the slot stays on disk
  absl::StatusOr<uint64_t> BringBack(Slot slot, uint64_t most_bytes);
  // Tries again to write those slots of tier NVME whose write has failed, until one fails. Does
  // nothing if somebody holds the slots. Waits for the disk.
  void WriteBack();

  // ---- Bytes, for the owner of a hold ----
  // Returns the buffer of a slot in memory; null if there is none.
  BufferPtr data(const SlotHold& hold, Slot slot) const;
  // Returns whether a slot has bytes, in memory or on disk. If not, every byte is the initial byte.
  bool has_contents(const SlotHold& hold, Slot slot) const;
  // Returns whether anybody but this object keeps the buffer of a slot.
  bool is_shared(const SlotHold& hold, Slot slot) const;
  // As Read above, for the bytes that the slot has now.
  absl::StatusOr<BufferPtr> Read(const SlotHold& hold, Slot slot) const;
  // Returns a new buffer with the bytes of a slot that has none in memory. They are
  // read from the disk if they are there, and are initial bytes otherwise. The buffer is in the
  // slot's own room at tier DRAM, and in `window`, which the caller has leased, at tier NVME. The
  // slot itself stays as it is. May wait for the disk.
  //   Status  DataLoss, ResourceExhausted
  absl::StatusOr<BufferPtr> Bring(const SlotHold& hold, Slot slot, Window* window);
  // Drops the bytes of a slot, in memory and on disk, so that it has initial bytes. Its format and
  // its room stay. May wait for the disk.
  void Clear(const SlotHold& hold, Slot slot);
  // Drops the bytes of a slot and returns a zero-filled buffer for new ones, which the caller
  // passes to Keep. The buffer is in the slot's own room; at tier NVME it is counted as "messages".
  // May wait for the disk.
  //   Status  ResourceExhausted: the old bytes are dropped all the same
  absl::StatusOr<BufferPtr> Replace(const SlotHold& hold, Slot slot);
  // Sets View::changing until the hold ends: readers no longer get the present version.
  void BeginChange(const SlotHold& hold);
  // Makes `bytes` the bytes of a slot, and erases the old value on disk. At tier NVME, bytes.data
  // is written to disk under `version`. bytes.spilled was written already, and stays there. If
  // bytes.data is not in the slot's own room, `room` is its reservation, which a slot of tier DRAM
  // takes over; a slot that is not placed gets its room so. May wait for the disk.
  //   Status  ResourceExhausted, DataLoss: the slot has the new bytes, but in memory
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
    return state.format.exists() && !state.is_unplaced ? Buffer::Footprint(Bytes(state)) : 0;
  }
  SlotState& state(Slot slot) REQUIRES(mutex_) { return slots_[SlotIndex(slot)]; }
  const SlotState& state(Slot slot) const REQUIRES(mutex_) { return slots_[SlotIndex(slot)]; }
  bool MaySpill(const SlotState& state) const;
  absl::Status RoomBesideReader(Slot slot);

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
  // The end of every hold replaces it, since the bytes may have changed. Readers that keep the old
  // bytes keep their hashes.
  std::shared_ptr<ServedHashes> hashes_ GUARDED_BY(mutex_) = std::make_shared<ServedHashes>();
};

}  // namespace orlop::server
