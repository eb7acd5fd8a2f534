#include "server/durability/flush_room.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/durability/flush.h"
#include "server/memory/accountant.h"
#include "server/tiers/tier.h"

namespace orlop::server {
namespace {

constexpr uint64_t kFlushCount = 2;  // that exist at once
// Keys, checksums and RocksDB's own entries take less than this for a shard, and for a flush.
constexpr uint64_t kShardOverheadBytes = 4 << 10;
constexpr uint64_t kFlushOverheadBytes = 64 << 10;

}  // namespace

uint64_t FlushRoom::FlushBytes(uint64_t state_bytes, uint64_t shard_count,
                               uint64_t definition_bytes) {
  return state_bytes + shard_count * kShardOverheadBytes + definition_bytes + kFlushOverheadBytes;
}

absl::Status FlushRoom::Grow(uint64_t flush_bytes) {
  return Reserve(flush_bytes, /*is_stored=*/false);
}
absl::Status FlushRoom::Take(uint64_t flush_bytes) {
  return Reserve(flush_bytes, /*is_stored=*/true);
}

absl::Status FlushRoom::TakeMore(uint64_t flush_bytes) {
  {
    MutexLock lock(&mutex_);
    if (flush_bytes <= flush_bytes_) return absl::OkStatus();
  }
  return Take(flush_bytes);
}

absl::Status FlushRoom::Reserve(uint64_t flush_bytes, bool is_stored) {
  Accountant& accountant = tiers_->accountant();
  const uint64_t wanted = kFlushCount * flush_bytes;
  const uint64_t written = std::min(wanted, FlushCount() * flush_bytes);
  // Not all bytes that the budget of the disk has need be there: others write to it too.
  const uint64_t on_disk = tiers_->FreeDiskBytes().value_or(UINT64_MAX / 2) + written;
  MutexLock lock(&mutex_);
  const uint64_t held = room_.reserved_bytes();
  const uint64_t promised = Tiers::kDiskMarginBytes + accountant.reserved_bytes(Tier::kNvme) -
                            accountant.used_bytes(Tier::kNvme) + room_.used_bytes();
  const uint64_t free = accountant.free_bytes(Tier::kNvme);
  const uint64_t left = held + std::min(free, on_disk - std::min(on_disk, promised));
  const uint64_t missing = wanted - std::min(wanted, left);
  absl::Status status;
  if (missing > 0)
    status = Refusal(wanted, left,
                     absl::StrCat("for its flushes, twice ", flush_bytes,
                                  ", since the newest one stays until the next is written"));
  if (missing > 0 && !is_stored) return status;
  absl::Status grown = accountant.Grow(&room_, use_, std::min(wanted, held + free));
  if (!grown.ok() && !is_stored) return grown;
  flush_bytes_ = std::max(flush_bytes_, flush_bytes);
  missing_bytes_ = missing;
  room_.SetUsed(std::min(written, room_.reserved_bytes())).IgnoreError();  // that much is reserved
  return status;
}

absl::Status FlushRoom::Refusal(uint64_t bytes, uint64_t left, const std::string& purpose) const {
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::BUDGET);
  detail.set_job(use_.job);
  detail.set_field(use_.slot);
  detail.set_actual(absl::StrCat(bytes));
  detail.set_limit(absl::StrCat(left));
  return MakeError(
      absl::StatusCode::kResourceExhausted,
      absl::StrCat("job '", use_.job, "' needs ", bytes, " bytes of disk ", purpose, "; ", left,
                   " are left for it: no space left. A larger disk (--data-dir), more servers, "
                   "smaller optimizer state or the deletion of another job make room"),
      detail);
}

void FlushRoom::ShrinkTo(uint64_t flush_bytes) {
  MutexLock lock(&mutex_);
  flush_bytes_ = std::min(flush_bytes_, flush_bytes);
  room_.ShrinkTo(kFlushCount * flush_bytes);
}

uint64_t FlushRoom::missing_bytes() const {
  MutexLock lock(&mutex_);
  return missing_bytes_;
}

uint64_t FlushRoom::StagedBytes() const {
  for (const UsedBytes& used : tiers_->accountant().Snapshot())
    if (used.use == Use{Tier::kDram, use_.job, "staging"}) return used.used_bytes;
  return 0;
}

// Whether the flush would take bytes that were promised to others, or that the disk does not have.
bool FlushRoom::IsShort(uint64_t bytes) {
  Accountant& accountant = tiers_->accountant();
  {
    MutexLock lock(&mutex_);
    const uint64_t unused = room_.reserved_bytes() - room_.used_bytes();
    extra_ = Reservation();
    if (unused < bytes) {
      absl::StatusOr<Reservation> extra = accountant.Reserve(use_, bytes - unused);
      if (!extra.ok()) return true;
      extra_ = *std::move(extra);
    }
  }
  const uint64_t promised =
      accountant.reserved_bytes(Tier::kNvme) - accountant.used_bytes(Tier::kNvme);
  return !tiers_->CheckDisk(use_.job, promised).ok();
}

absl::Status FlushRoom::MakeRoom(const std::vector<int64_t>& needed, bool with_staged,
                                 bool* has_erased) {
  uint64_t bytes = with_staged ? StagedBytes() : 0;
  {
    MutexLock lock(&mutex_);
    bytes += flush_bytes_;
  }
  if (!IsShort(bytes)) return absl::OkStatus();
  *has_erased = true;
  // If one of these fails, the free bytes show it.
  if (KeepFlushes(store_, use_.job, needed).ok()) ReclaimFlushes(store_, use_.job).IgnoreError();
  Count();
  const uint64_t free = tiers_->FreeDiskBytes().value_or(UINT64_MAX);
  if (free >= bytes) return absl::OkStatus();
  return Refusal(bytes, free, "for a flush");
}

uint64_t FlushRoom::FlushCount() const {
  const absl::StatusOr<std::vector<FlushInfo>> flushes = ListFlushes(*store_, use_.job);
  return flushes.ok() ? flushes->size() : 0;
}

void FlushRoom::Count() {
  const uint64_t count = FlushCount();
  MutexLock lock(&mutex_);
  extra_ = Reservation();
  room_.SetUsed(std::min(count * flush_bytes_, room_.reserved_bytes())).IgnoreError();
}

}  // namespace orlop::server
