// The room on disk for the flushes of one job. Two of them exist at once: the newest one that all
// servers have stays until the next one is written. So much is reserved when the job is configured,
// as the use "flush" of the NVMe tier, and spilled slots cannot take it. Other programs can: a
// flush that finds too little room has those erased first that may go.
//   Threads  All methods are safe from any thread. The caller makes one call of MakeRoom or Count
//            at a time for a job.
//   Locks    Its lock is taken last but for the accountant's, and no disk is waited for under it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "base/mutex.h"
#include "server/tiers/tier.h"
#include "storage/store.h"

namespace orlop::server {

class FlushRoom {
 public:
  // `tiers` and `store` outlive this object.
  FlushRoom(const std::string& job, Tiers* tiers, storage::Store* store)
      : use_{Tier::kNvme, job, "flush"}, tiers_(tiers), store_(store) {}

  // Returns the bytes that a flush takes at most, without staged pieces. `state_bytes`: of all
  // slots; `definition_bytes`: of manifest and optimizer.
  static uint64_t FlushBytes(uint64_t state_bytes, uint64_t shard_count, uint64_t definition_bytes);

  // Reserves room for two flushes of `flush_bytes`, if that is more than now.
  // Waits for the disk.
  //   Status  ResourceExhausted (BUDGET: `actual` is what the two take, `limit` what the disk has
  //           for them): the room is as before
  absl::Status Grow(uint64_t flush_bytes);
  // Gives room back until two flushes of `flush_bytes` fit.
  void ShrinkTo(uint64_t flush_bytes);
  // As Grow, for a job that is stored already: what the disk does not have is missing, and that is
  // no error. Returns the error for the log.
  absl::Status Take(uint64_t flush_bytes);
  // As Take, but only if a flush has become larger: a LOAD has set tensors that were unset.
  absl::Status TakeMore(uint64_t flush_bytes);
  // Returns the bytes that Take could not reserve; 0 once Grow has succeeded.
  uint64_t missing_bytes() const;

  // Makes room for a flush that is to be written now. If there is too little on the disk without
  // bytes that were promised to others, erases all flushes of the job but those of the steps
  // `needed`, and sets `*has_erased`. `with_staged`: the flush has the staged pieces too. Waits for
  // the disk.
  //   Status  ResourceExhausted (BUDGET): there is too little room all the same
  absl::Status MakeRoom(const std::vector<int64_t>& needed, bool with_staged, bool* has_erased);
  // Counts the flushes that are on disk as used, by their number. Call it after flushes were
  // written or erased. Waits for the disk.
  void Count();

 private:
  absl::Status Reserve(uint64_t flush_bytes, bool is_stored);
  bool IsShort(uint64_t bytes);
  uint64_t StagedBytes() const;
  uint64_t FlushCount() const;
  absl::Status Refusal(uint64_t bytes, uint64_t left, const std::string& purpose) const;

  const Use use_;
  Tiers* const tiers_;
  storage::Store* const store_;
  mutable Mutex mutex_;
  uint64_t flush_bytes_ GUARDED_BY(mutex_) = 0;
  uint64_t missing_bytes_ GUARDED_BY(mutex_) = 0;
  Reservation room_ GUARDED_BY(mutex_);
  Reservation extra_ GUARDED_BY(mutex_);  // of a third flush, while it is written
};

}  // namespace orlop::server
