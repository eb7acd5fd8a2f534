#include "server/tiers/tier.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/types/span.h"
#include "base/checksum.h"
#include "base/mutex.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "storage/store.h"

namespace orlop::server {
namespace {

using storage::kPassingPrefix;
// One call of BringBack brings at most so much, so that its thread is soon free for an apply.
constexpr uint64_t kBringBytes = 256 << 20;
// After a spill, memory that is free is left alone for so long: what needed it may come again.
constexpr std::chrono::seconds kCalm(10);

std::string ValueKey(const SlotKey& key, uint64_t serial) {
  return absl::StrCat(kPassingPrefix, key.job, absl::StrFormat("/%08x/", key.shard),
                      SlotName(key.slot), absl::StrFormat("/%016x", serial));
}

std::string Encode(const SpilledSlot& slot) {
  const uint64_t fields[] = {static_cast<uint64_t>(slot.version), slot.epoch, slot.bytes,
                             slot.checksum, slot.serial};
  return std::string(reinterpret_cast<const char*>(fields), sizeof(fields));
}

absl::Status Named(const absl::Status& status, const SlotKey& key) {
  if (status.ok()) return status;
  v1::ErrorDetail detail;
  detail.set_job(key.job);
  detail.set_tensor(key.tensor);
  detail.set_reason(absl::IsResourceExhausted(status) ? v1::ErrorDetail::BUDGET
                                                      : v1::ErrorDetail::LOST);
  const std::string context = absl::StrCat("spilled ", SlotName(key.slot), " of tensor '",
                                           key.tensor, "', shard id ", key.shard);
  // The value was written by this process. If the store does not find it, it is lost.
  if (absl::IsNotFound(status))
    return Annotated(absl::DataLossError(status.message()), context, detail);
  return Annotated(status, context, detail);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tiers>> Tiers::Create(
    Accountant* accountant, storage::Store* store,
    std::function<absl::StatusOr<uint64_t>()> free_disk_bytes) {
  if (store != nullptr) {
    storage::Batch leftovers;
    auto values = store->Scan(kPassingPrefix);
    if (!values.ok()) return values.status();
    for (auto& [key, value] : *values) leftovers.erase.push_back(key);
    leftovers.erase_bulk_prefixes = {kPassingPrefix};
    if (absl::Status erased = store->Commit(leftovers); !erased.ok()) return erased;
  }
  return std::unique_ptr<Tiers>(new Tiers(accountant, store, std::move(free_disk_bytes)));
}

absl::StatusOr<Reservation> Tiers::Reserve(const Use& use, uint64_t bytes, const Spillable* keeps) {
  auto reserved = accountant_->Reserve(use, bytes);
  if (reserved.ok() || use.tier != Tier::kDram || !can_spill()) return reserved;
  const std::vector<Spillable*> order = Borrow();
  {
    MutexLock lock(&mutex_);
    last_spill_ = std::chrono::steady_clock::now();
    is_bringing_back_ = false;
  }
  for (Spillable* spillable : order) {
    if (spillable == keeps) continue;
    // Somebody else may reserve what was given back.
    for (bool may_do = bytes <= accountant_->limit_bytes(Tier::kDram); !reserved.ok() && may_do;) {
      const uint64_t free = accountant_->free_bytes(Tier::kDram);
      may_do = free >= bytes || spillable->SpillCold(bytes - free) > 0;
      reserved = accountant_->Reserve(use, bytes);
    }
    if (reserved.ok()) break;
  }
  GiveBack(order);
  return reserved;
}

// Returns all spillables in the order of Rank. None is unregistered until GiveBack.
std::vector<Spillable*> Tiers::Borrow() {
  std::vector<std::pair<decltype(std::declval<Spillable>().Rank()), Spillable*>> ranked;
  {
    MutexLock lock(&mutex_);
    for (auto& [spillable, users] : spillables_) {
      ++users;
      ranked.emplace_back(spillable->Rank(), spillable);
    }
  }
  std::sort(ranked.begin(), ranked.end());
  std::vector<Spillable*> order;
  order.reserve(ranked.size());
  for (const auto& [rank, spillable] : ranked) order.push_back(spillable);
  return order;
}

void Tiers::GiveBack(const std::vector<Spillable*>& borrowed) {
  MutexLock lock(&mutex_);
  for (Spillable* spillable : borrowed) --spillables_[spillable];
  given_back_.SignalAll();
}

bool Tiers::BringBack(std::chrono::steady_clock::time_point now) {
  const uint64_t limit = accountant_->limit_bytes(Tier::kDram);
  const uint64_t spare = limit / 16;
  {
    MutexLock lock(&mutex_);
    const bool is_calm = now - last_spill_ >= kCalm;
    if (is_calm || accountant_->free_bytes(Tier::kDram) >= limit / 2) is_bringing_back_ = true;
    if (!is_bringing_back_) return false;
  }
  const std::vector<Spillable*> order = Borrow();
  uint64_t brought = 0;
  for (auto at = order.rbegin(); at != order.rend() && brought < kBringBytes; ++at) {
    const uint64_t free = accountant_->free_bytes(Tier::kDram);
    if (free > spare) brought += (*at)->BringBack(std::min(free - spare, kBringBytes - brought));
  }
  GiveBack(order);
  MutexLock lock(&mutex_);
  is_bringing_back_ = brought > 0;
  return is_bringing_back_;
}

absl::StatusOr<BufferPtr> Tiers::NewBuffer(const Use& use, uint64_t bytes, Fill fill) {
  auto reserved = Reserve(use, Buffer::Footprint(bytes));
  if (!reserved.ok()) return reserved.status();
  return reserved->Allocate(bytes, fill);
}

void Tiers::Register(Spillable* spillable) {
  MutexLock lock(&mutex_);
  spillables_[spillable] = 0;
}
void Tiers::Unregister(Spillable* spillable) {
  MutexLock lock(&mutex_);
  while (spillables_[spillable] > 0) given_back_.Wait(&mutex_);
  spillables_.erase(spillable);
}

absl::StatusOr<uint64_t> Tiers::FreeDiskBytes() {
  return free_disk_bytes_ ? free_disk_bytes_() : UINT64_MAX;
}

absl::Status Tiers::CheckDisk(const std::string& job, uint64_t bytes) {
  absl::StatusOr<uint64_t> free = FreeDiskBytes();
  if (free.ok() && *free < kDiskMarginBytes + bytes)
    if (const std::vector<std::string> keys = TakeDiscarded(); !keys.empty()) {
      (void)store_->Commit({{}, keys, keys});  // after an error, the next start erases the values
      (void)store_->Reclaim(kPassingPrefix);
      free = FreeDiskBytes();
    }
  if (!free.ok() || *free >= kDiskMarginBytes + bytes)
    return absl::OkStatus();  // if the free bytes are not known, a full disk fails the write itself
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::BUDGET);
  detail.set_job(job);
  detail.set_actual(absl::StrCat(bytes));
  detail.set_limit(absl::StrCat(*free));
  return MakeError(absl::StatusCode::kResourceExhausted,
                   absl::StrCat("job '", job, "' needs ", bytes, " bytes of disk and ",
                                kDiskMarginBytes, " to spare; ", *free, " are free: no space left"),
                   detail);
}

absl::StatusOr<SpilledSlot> Tiers::Spill(const SlotKey& key, int64_t version,
                                         absl::Span<const uint8_t> bytes, const SpilledSlot* old) {
  if (absl::Status room = CheckDisk(key.job, bytes.size()); !room.ok()) return Named(room, key);
  SpilledSlot fresh{version, epoch_, bytes.size(), Checksum64(bytes.data(), bytes.size()),
                    next_serial_++};
  const std::string fresh_key = ValueKey(key, fresh.serial);
  absl::Status status = store_->WriteBulk(fresh_key, bytes);
  if (status.ok()) status = store_->Sync();
  storage::Batch change;
  change.put.emplace_back(fresh_key, Encode(fresh));
  const std::vector<std::string> discarded = TakeDiscarded();
  change.erase = discarded;
  if (old != nullptr) change.erase.push_back(ValueKey(key, old->serial));
  change.erase_bulk = change.erase;
  if (status.ok()) status = store_->Commit(change);
  if (status.ok()) return fresh;
  {
    MutexLock lock(&discarded_mutex_);
    discarded_.insert(discarded_.end(), discarded.begin(), discarded.end());
  }
  // Erases parts of the new value that were written. An error of this is ignored: the caller learns
  // the first error.
  (void)store_->Commit({{}, {}, {fresh_key}});
  return Named(status, key);
}

absl::Status Tiers::Restore(const SlotKey& key, const SpilledSlot& spilled,
                            absl::Span<uint8_t> out) const {
  const std::string value_key = ValueKey(key, spilled.serial);
  auto index = store_->Get(value_key);
  if (!index.ok()) return Named(index.status(), key);
  if (*index != Encode(spilled))
    return Named(absl::DataLossError("the index names another version"), key);
  if (absl::Status read = store_->ReadBulk(value_key, out); !read.ok()) return Named(read, key);
  const uint64_t checksum = Checksum64(out.data(), out.size());
  if (checksum != spilled.checksum)
    return Named(absl::DataLossError(
                     absl::StrFormat("checksum %016x; expected %016x", checksum, spilled.checksum)),
                 key);
  return absl::OkStatus();
}

absl::Status Tiers::Erase(const SlotKey& key, const SpilledSlot& spilled) {
  const std::string value_key = ValueKey(key, spilled.serial);
  return store_->Commit({{}, {value_key}, {value_key}});
}

void Tiers::Discard(const SlotKey& key, const SpilledSlot& spilled) {
  MutexLock lock(&discarded_mutex_);
  discarded_.push_back(ValueKey(key, spilled.serial));
}

std::vector<std::string> Tiers::TakeDiscarded() {
  MutexLock lock(&discarded_mutex_);
  return std::exchange(discarded_, {});
}

}  // namespace orlop::server
