// Where bytes go when memory is full: spilled slots on disk, and the order in which memory is found
// for new promises.
//
// Format on disk (bulk keys "spill/...", index keys "index/..."; storage/store.h):
//   index  spill/JOB/SHARD/SLOT/SERIAL = version:i64 epoch:u64 bytes:u64 xxh3:u64 serial:u64,
//   little endian (40 bytes) bulk   spill/JOB/SHARD/SLOT/SERIAL = the slot's bytes as in memory
// A value is written under a new serial, synced, then entered in the index and the old one erased
// in one batch: what is read is always a whole version. Example:
// spill/gpt/00000007/exp_avg/000000000000002a.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/mutex.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "storage/store.h"

namespace orlop::server {

// Names one slot of one shard in messages and on disk.
struct SlotKey {
  std::string job;
  int32_t shard = 0;  // id
  Slot slot = Slot::kWeight;
  std::string tensor;  // for messages
};

// What the index says about a spilled slot.
struct SpilledSlot {
  int64_t version = 0;
  uint64_t epoch = 0;
  uint64_t bytes = 0;
  uint64_t checksum = 0;  // XXH3-64
  uint64_t serial = 0;
};

// Somebody who can turn memory into disk.
class Spillable {
 public:
  virtual ~Spillable() = default;
  // Moves its coldest slots to disk until `wanted_bytes` of memory reservations were given back or
  // nothing cold is left. Returns the bytes given back. Writes the disk.
  virtual uint64_t SpillCold(uint64_t wanted_bytes) = 0;
};

// Threads: all methods are safe from any thread. No lock of a caller that SpillCold takes may be
// held in Reserve.
class Tiers {
 public:
  // `store` null: nothing can spill. Both must outlive this. Values of an earlier process are
  // erased (they belong to no version). `free_disk_bytes` tells what is free on the store's disk
  // now; null: not known, the store's own refusals must do.
  static absl::StatusOr<std::unique_ptr<Tiers>> Create(
      Accountant* accountant, storage::Store* store,
      std::function<absl::StatusOr<uint64_t>()> free_disk_bytes = nullptr);

  // Promises memory. If it is short, cold slots are spilled, but not those of `keeps`; that waits
  // for the disk. ResourceExhausted as Accountant::Reserve.
  absl::StatusOr<Reservation> Reserve(const Use& use, uint64_t bytes,
                                      const Spillable* keeps = nullptr);
  // A buffer of its own reservation, spilling as above.
  absl::StatusOr<BufferPtr> NewBuffer(const Use& use, uint64_t bytes);
  bool can_spill() const { return store_ != nullptr; }
  Accountant& accountant() { return *accountant_; }

  void Register(Spillable* spillable);
  void Unregister(Spillable* spillable);  // returns when no SpillCold of it is running

  // Whether the disk has room now for `bytes` more, whatever was promised: others write there too.
  // If it has not, discarded values are erased first.
  //   Status  ResourceExhausted (BUDGET).
  absl::Status CheckDisk(const std::string& job, uint64_t bytes);

  // Writes a slot. `old`: the value it replaces, null if none. Room on disk is the caller's
  // reservation.
  //   Status  ResourceExhausted, DataLoss (naming tensor, shard, slot); the old value stays.
  absl::StatusOr<SpilledSlot> Spill(const SlotKey& key, int64_t version,
                                    absl::Span<const uint8_t> bytes, const SpilledSlot* old);
  // Reads a slot back; `out` has spilled.bytes bytes. DataLoss naming tensor, shard and slot if it
  // is not what was written.
  absl::Status Restore(const SlotKey& key, const SpilledSlot& spilled,
                       absl::Span<uint8_t> out) const;
  absl::Status Erase(const SlotKey& key, const SpilledSlot& spilled);
  // As Erase, without waiting for the disk: the value is erased with the next Spill.
  void Discard(const SlotKey& key, const SpilledSlot& spilled);

  void set_epoch(uint64_t epoch) { epoch_ = epoch; }

 private:
  Tiers(Accountant* accountant, storage::Store* store,
        std::function<absl::StatusOr<uint64_t>()> free_disk_bytes)
      : accountant_(accountant), store_(store), free_disk_bytes_(std::move(free_disk_bytes)) {}
  absl::StatusOr<uint64_t> FreeDiskBytes();
  std::vector<std::string> TakeDiscarded();

  Accountant* const accountant_;
  storage::Store* const store_;
  const std::function<absl::StatusOr<uint64_t>()> free_disk_bytes_;
  std::atomic<uint64_t> epoch_ = 0;
  std::atomic<uint64_t> next_serial_ = 1;
  Mutex mutex_;
  std::set<Spillable*> spillables_ GUARDED_BY(mutex_);
  Mutex discarded_mutex_;                                            // taken last
  std::vector<std::string> discarded_ GUARDED_BY(discarded_mutex_);  // keys of values
};

}  // namespace orlop::server
