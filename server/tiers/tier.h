// A slot is in one of two tiers, memory (DRAM) or disk (NVME). Tiers writes spilled slots to disk
// and reads them back. It reserves memory, and has slots spilled if too little memory is free.
//
// Format on disk: a spilled slot is two values of a storage::Store under one key,
// spill/JOB/SHARD/SLOT/SERIAL, for example spill/gpt/00000007/exp_avg/000000000000002a. SHARD (the
// id) and SERIAL are hexadecimal.
//   small value ("index")  version:i64 epoch:u64 bytes:u64 xxh3:u64 serial:u64, little endian
//   bulk value             the slot's bytes, as in memory
// A slot is written under a new serial and synced. Then one batch enters it in the index and erases
// the old value, so that a read always returns the bytes of one version.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/mutex.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"  // IWYU pragma: export
#include "storage/store.h"

namespace orlop::server {

// A SlotKey names one slot of one shard, in messages and on disk.
struct SlotKey {
  std::string job;
  int32_t shard = 0;  // id
  Slot slot = Slot::kWeight;
  std::string tensor;  // the name, which only messages use
};

// A SpilledSlot describes one spilled value, as the index does. Whoever has it can read the value.
struct SpilledSlot {
  int64_t version = 0;
  uint64_t epoch = 0;
  uint64_t bytes = 0;
  uint64_t checksum = 0;  // XXH3-64 of the bytes
  uint64_t serial = 0;
};

// A Spillable can free memory by moving slots to disk. The Residency of each job is one.
//   Threads  All methods are safe from any thread.
class Spillable {
 public:
  virtual ~Spillable() = default;
  // Spills slots, the coldest first, until `wanted_bytes` of reserved memory were given back or
  // nothing more can be spilled. Returns the bytes given back. Waits for the disk.
  virtual uint64_t SpillCold(uint64_t wanted_bytes) = 0;
  // Brings slots back into memory, those that are used next first, as long as they take at most
  // `most_bytes`. Returns the bytes that they take. Waits for the disk.
  virtual uint64_t BringBack(uint64_t most_bytes) = 0;
  // Who spills first: who was used least recently; among equals, the first by name.
  virtual std::pair<std::chrono::steady_clock::time_point, std::string> Rank() const = 0;
};

// A Tiers has the spilled slots of all jobs of this server, and makes reservations that may spill.
//   Threads  All methods are safe from any thread.
//   Locks    Reserve and NewBuffer call SpillCold, so their caller must not hold a lock that
//            SpillCold takes. No lock of Tiers is held meanwhile.
class Tiers {
 public:
  // Erases the spilled values of earlier processes. If `store` is null, nothing can spill.
  // `accountant` and `store` outlive the object. `free_disk_bytes` returns the bytes that are free
  // on the store's disk now. If it is null, the only limits are that of the accountant and the
  // store's own errors.
  //   Status  of the store
  static absl::StatusOr<std::unique_ptr<Tiers>> Create(
      Accountant* accountant, storage::Store* store,
      std::function<absl::StatusOr<uint64_t>()> free_disk_bytes = nullptr);

  // Reserves bytes as Accountant::Reserve does. If too little memory is free, it spills slots
  // first, but none of `keeps`, and may wait for the disk. A reservation of tier NVME spills
  // nothing.
  //   Status  ResourceExhausted, as Accountant::Reserve
  absl::StatusOr<Reservation> Reserve(const Use& use, uint64_t bytes,
                                      const Spillable* keeps = nullptr);
  // Returns a zero-filled buffer with a reservation of its own, made as by Reserve.
  //   Status  ResourceExhausted
  absl::StatusOr<BufferPtr> NewBuffer(const Use& use, uint64_t bytes, Fill fill = Fill::kZeros);
  bool can_spill() const { return store_ != nullptr; }
  Accountant& accountant() { return *accountant_; }

  // Registers a Spillable, which Reserve and BringBack may then call until Unregister has returned.
  // Unregister waits until no call of it is running.
  void Register(Spillable* spillable);
  void Unregister(Spillable* spillable);

  // Brings some of the spilled slots back, of the job that was used last first. Begins when half of
  // the memory is free, or nothing was spilled for 10 s, and goes on with each call until a
  // sixteenth is free or no slot is on disk. Returns whether there is more to bring. Waits for the
  // disk.
  bool BringBack(std::chrono::steady_clock::time_point now = std::chrono::steady_clock::now());

  // Checks that the disk has `bytes` free and kDiskMarginBytes to spare. The accountant does not
  // know this, because others write to the same disk. If too little is free, discarded values are
  // erased first. `job` is for the message. May wait for the disk. OK if the free bytes are not
  // known.
  //   Status  ResourceExhausted (BUDGET)
  absl::Status CheckDisk(const std::string& job, uint64_t bytes);
  // The bytes that CheckDisk leaves free for the store's log and its compactions, which should
  // never find the disk full.
  static constexpr uint64_t kDiskMarginBytes = 16 << 20;

  // Returns the bytes that are free on the store's disk; the largest number if they are not known.
  absl::StatusOr<uint64_t> FreeDiskBytes();

  // Writes a slot to disk, synced, and erases `old`, the value that it replaces (null: none). The
  // caller has reserved the bytes on disk. Waits for the disk. Requires can_spill().
  //   Status  ResourceExhausted, DataLoss; the message names tensor, shard and slot; `old` stays
  absl::StatusOr<SpilledSlot> Spill(const SlotKey& key, int64_t version,
                                    absl::Span<const uint8_t> bytes, const SpilledSlot* old);
  // Reads a spilled value. `out` has spilled.bytes bytes. Waits for the disk.
  //   Status  DataLoss: the value is gone, or is not as it was written; the message names tensor,
  //           shard and slot
  absl::Status Restore(const SlotKey& key, const SpilledSlot& spilled,
                       absl::Span<uint8_t> out) const;
  // Erases a spilled value. Waits for the disk.
  //   Status  of the store; the value may stay until the next start of a server
  absl::Status Erase(const SlotKey& key, const SpilledSlot& spilled);
  // As Erase, but does not wait: the next Spill of any slot erases the value.
  void Discard(const SlotKey& key, const SpilledSlot& spilled);

  // Sets the epoch that later spilled values record.
  void set_epoch(uint64_t epoch) { epoch_ = epoch; }

 private:
  Tiers(Accountant* accountant, storage::Store* store,
        std::function<absl::StatusOr<uint64_t>()> free_disk_bytes)
      : accountant_(accountant), store_(store), free_disk_bytes_(std::move(free_disk_bytes)) {}
  std::vector<std::string> TakeDiscarded();
  std::vector<Spillable*> Borrow();
  void GiveBack(const std::vector<Spillable*>& borrowed);

  Accountant* const accountant_;
  storage::Store* const store_;
  const std::function<absl::StatusOr<uint64_t>()> free_disk_bytes_;
  std::atomic<uint64_t> epoch_ = 0;
  std::atomic<uint64_t> next_serial_ = 1;
  Mutex mutex_;
  CondVar given_back_;
  std::map<Spillable*, int> spillables_ GUARDED_BY(mutex_);  // with the calls that use each
  bool is_bringing_back_ GUARDED_BY(mutex_) = false;
  std::chrono::steady_clock::time_point last_spill_ GUARDED_BY(mutex_);
  Mutex discarded_mutex_;                                            // taken last
  std::vector<std::string> discarded_ GUARDED_BY(discarded_mutex_);  // keys of values
};

}  // namespace orlop::server
