#include "server/memory/accountant.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/memory/buffer_pool.h"

namespace orlop::server {
namespace {

constexpr uint64_t kPageBytes = 4096;
// A buffer of at most this size comes from malloc; a larger one has pages of its own.
constexpr uint64_t kSmallBytes = 16 << 10;
constexpr int64_t kRestMs = 2000;
constexpr size_t kTierCount = 2;

uint64_t RoundUp(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

int64_t NowMs() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

const char* TierName(Tier tier) { return tier == Tier::kDram ? "DRAM" : "NVME"; }

namespace internal {

// The numbers of a tier, or of one use.
struct Counts {
  uint64_t reserved = 0, used = 0, peak = 0;
  int64_t pools = 0;       // pools of this use
  bool forgotten = false;  // the destructor of the last pool erases the use

  void AddUsed(uint64_t bytes) {
    used += bytes;
    peak = std::max(peak, used);
  }
};

struct Account {
  mutable Mutex mutex;
  uint64_t limit[kTierCount] GUARDED_BY(mutex) = {};
  Counts total[kTierCount] GUARDED_BY(mutex);
  std::map<Use, Counts> uses GUARDED_BY(mutex);
  BufferPool idle GUARDED_BY(mutex);

  // Removes the idle pages for which the used bytes of DRAM leave no room. The caller unmaps them
  // when it has released the mutex.
  std::vector<Pages> ShrinkIdle() REQUIRES(mutex) {
    constexpr auto dram = static_cast<size_t>(Tier::kDram);
    return idle.ShrinkTo(limit[dram] - total[dram].used);
  }
};

// A Pool has the bytes of one reservation. The reservation and each of its buffers keep it alive.
struct Pool {
  Pool(std::shared_ptr<Account> account, const Use& use, Counts* counts)
      : account(std::move(account)), use(use), counts(counts) {
    ++counts->pools;
  }
  ~Pool() {
    MutexLock lock(&account->mutex);
    GiveBack(reserved);
    if (--counts->pools == 0 && counts->forgotten) account->uses.erase(use);
  }

  Counts& total() REQUIRES(account->mutex) { return account->total[static_cast<size_t>(use.tier)]; }
  // Returns reserved bytes to the tier.
  void GiveBack(uint64_t bytes) REQUIRES(account->mutex) {
    reserved -= bytes;
    counts->reserved -= bytes;
    total().reserved -= bytes;
  }
  // Counts reserved bytes as used. ResourceExhausted (BUDGET) if fewer are unused. If `idle` is not
  // null, sets it to idle pages of this size, if there are any.
  absl::Status Take(uint64_t bytes, Pages* idle = nullptr) {
    std::vector<Pages> removed;
    {
      MutexLock lock(&account->mutex);
      if (bytes > reserved - used)
        return MakeError(
            absl::StatusCode::kResourceExhausted,
            absl::StrCat(use.slot, " of job '", use.job, "' asks for ", bytes, " bytes; ",
                         reserved - used, " of the ", reserved, " reserved are left"),
            v1::ErrorDetail::BUDGET);
      used += bytes;
      counts->AddUsed(bytes);
      total().AddUsed(bytes);
      if (idle != nullptr) *idle = account->idle.Take(bytes);
      removed = account->ShrinkIdle();
    }
    Unmap(removed);
    return absl::OkStatus();
  }
  // Counts used bytes as unused. If the Reservation is gone, they return to the tier. `pages`, if
  // not null, had the bytes and is idle from now on.
  void Return(uint64_t bytes, const Pages* pages = nullptr) {
    MutexLock lock(&account->mutex);
    used -= bytes;
    counts->used -= bytes;
    total().used -= bytes;
    if (pages != nullptr) account->idle.Give(*pages, NowMs());
    if (released) GiveBack(bytes);
  }
  // Gives back the unused bytes. After `for_ever`, used bytes are given back too when they are
  // returned.
  void Release(bool for_ever) {
    MutexLock lock(&account->mutex);
    released = released || for_ever;
    GiveBack(reserved - used);
  }

  const std::shared_ptr<Account> account;
  const Use use;
  Counts* const counts;  // of `use` in account->uses
  uint64_t reserved = 0;
  uint64_t used = 0;
  uint64_t set_used = 0;  // the part of `used` that SetUsed has set
  bool released = false;  // the Reservation was destroyed: returned bytes are given back
};

}  // namespace internal

// ---- Buffer ----

uint64_t Buffer::Footprint(uint64_t size_bytes) {
  return size_bytes <= kSmallBytes ? RoundUp(std::max<uint64_t>(size_bytes, 1), 64)
                                   : RoundUp(size_bytes, kPageBytes);
}

Buffer::Buffer(std::shared_ptr<internal::Pool> pool, uint8_t* data, uint64_t size)
    : pool_(std::move(pool)), data_(data), size_(size) {}

Buffer::~Buffer() {
  const uint64_t footprint = Footprint(size_);
  const Pages pages{data_, footprint};
  const bool is_small = size_ <= kSmallBytes;
  if (is_small) std::free(data_);
  pool_->Return(footprint, is_small ? nullptr : &pages);
}

// ---- Reservation ----

Reservation& Reservation::operator=(Reservation&& other) noexcept {
  Reservation old(std::move(*this));  // ends as the destructor says
  pool_ = std::move(other.pool_);
  return *this;
}

Reservation::~Reservation() {
  if (!pool_) return;
  if (pool_->set_used > 0) pool_->Return(pool_->set_used);
  pool_->Release(/*for_ever=*/true);
}

uint64_t Reservation::reserved_bytes() const {
  if (!pool_) return 0;
  MutexLock lock(&pool_->account->mutex);
  return pool_->reserved;
}

uint64_t Reservation::used_bytes() const {
  if (!pool_) return 0;
  MutexLock lock(&pool_->account->mutex);
  return pool_->used;
}

absl::StatusOr<BufferPtr> Reservation::Allocate(uint64_t size_bytes, Fill fill) {
  if (!pool_)
    return absl::ResourceExhaustedError(absl::StrCat("no bytes reserved; ", size_bytes, " asked"));
  const uint64_t footprint = Buffer::Footprint(size_bytes);
  const bool is_small = size_bytes <= kSmallBytes;
  Pages idle;
  if (absl::Status taken = pool_->Take(footprint, is_small ? nullptr : &idle); !taken.ok())
    return taken;
  uint8_t* data = idle.data;
  if (is_small)
    data = static_cast<uint8_t*>(std::aligned_alloc(64, footprint));
  else if (data == nullptr)
    data = MapPages(footprint).data;
  if (data == nullptr) {
    pool_->Return(footprint);
    return MakeError(absl::StatusCode::kResourceExhausted,
                     absl::StrCat("the system refused ", footprint, " bytes for ", pool_->use.slot),
                     v1::ErrorDetail::BUDGET);
  }
  const bool is_new = !is_small && idle.data == nullptr;
  if (fill == Fill::kZeros && !is_new) std::memset(data, 0, footprint);
  return BufferPtr(new Buffer(pool_, data, size_bytes));
}

absl::Status Reservation::SetUsed(uint64_t bytes) {
  if (!pool_)
    return bytes == 0 ? absl::OkStatus() : absl::ResourceExhaustedError("no bytes reserved");
  if (bytes > pool_->set_used) {
    if (absl::Status taken = pool_->Take(bytes - pool_->set_used); !taken.ok()) return taken;
  } else if (bytes < pool_->set_used) {
    pool_->Return(pool_->set_used - bytes);
  }
  pool_->set_used = bytes;
  return absl::OkStatus();
}

void Reservation::ShrinkTo(uint64_t bytes) {
  if (!pool_) return;
  MutexLock lock(&pool_->account->mutex);
  if (pool_->reserved > bytes)
    pool_->GiveBack(std::min(pool_->reserved - pool_->used, pool_->reserved - bytes));
}

void Reservation::Trim() {
  if (pool_) pool_->Release(/*for_ever=*/false);
}

// ---- Accountant ----

Accountant::Accountant(Limits limits) : account_(std::make_shared<internal::Account>()) {
  MutexLock lock(&account_->mutex);
  account_->limit[static_cast<size_t>(Tier::kDram)] = limits.dram_bytes;
  account_->limit[static_cast<size_t>(Tier::kNvme)] = limits.nvme_bytes;
}
Accountant::~Accountant() = default;

absl::StatusOr<Reservation> Accountant::Reserve(const Use& use, uint64_t bytes) {
  Reservation reservation;
  absl::Status status = Grow(&reservation, use, bytes);
  if (!status.ok()) return status;
  return reservation;
}

absl::Status Accountant::Grow(Reservation* reservation, const Use& use, uint64_t wanted_bytes) {
  MutexLock lock(&account_->mutex);
  const uint64_t held = reservation->pool_ ? reservation->pool_->reserved : 0;
  const uint64_t bytes = wanted_bytes - std::min(held, wanted_bytes);
  internal::Counts& total = account_->total[static_cast<size_t>(use.tier)];
  const uint64_t limit = account_->limit[static_cast<size_t>(use.tier)];
  const uint64_t free = limit - total.reserved;
  if (bytes > free) {
    v1::ErrorDetail detail;
    detail.set_reason(v1::ErrorDetail::BUDGET);
    detail.set_job(use.job);
    detail.set_field(use.slot);
    detail.set_actual(absl::StrCat(bytes));
    detail.set_limit(absl::StrCat(limit));
    return MakeError(
        absl::StatusCode::kResourceExhausted,
        absl::StrCat(use.slot, use.job.empty() ? "" : " of job '", use.job,
                     use.job.empty() ? "" : "'", " asks for ", bytes, " bytes of ",
                     TierName(use.tier), "; ", free, " are free of the budget of ", limit),
        detail);
  }
  internal::Counts& counts = account_->uses[use];
  counts.forgotten = false;
  if (!reservation->pool_)
    reservation->pool_ = std::make_shared<internal::Pool>(account_, use, &counts);
  reservation->pool_->reserved += bytes;
  counts.reserved += bytes;
  total.reserved += bytes;
  return absl::OkStatus();
}

uint64_t Accountant::limit_bytes(Tier tier) const {
  MutexLock lock(&account_->mutex);
  return account_->limit[static_cast<size_t>(tier)];
}
uint64_t Accountant::reserved_bytes(Tier tier) const {
  MutexLock lock(&account_->mutex);
  return account_->total[static_cast<size_t>(tier)].reserved;
}
uint64_t Accountant::free_bytes(Tier tier) const {
  MutexLock lock(&account_->mutex);
  return account_->limit[static_cast<size_t>(tier)] -
         account_->total[static_cast<size_t>(tier)].reserved;
}
uint64_t Accountant::used_bytes(Tier tier) const {
  MutexLock lock(&account_->mutex);
  return account_->total[static_cast<size_t>(tier)].used;
}
uint64_t Accountant::peak_bytes(Tier tier) const {
  MutexLock lock(&account_->mutex);
  return account_->total[static_cast<size_t>(tier)].peak;
}

uint64_t Accountant::idle_bytes() const {
  MutexLock lock(&account_->mutex);
  return account_->idle.idle_bytes();
}

void Accountant::GiveBackIdle() {
  std::vector<Pages> rested;
  {
    MutexLock lock(&account_->mutex);
    rested = account_->idle.Rest(NowMs() - kRestMs);
  }
  Unmap(rested);
}

std::vector<UsedBytes> Accountant::Snapshot() const {
  MutexLock lock(&account_->mutex);
  std::vector<UsedBytes> snapshot;
  for (const auto& [use, counts] : account_->uses)
    snapshot.push_back({use, counts.reserved, counts.used, counts.peak});
  return snapshot;
}

void Accountant::Forget(const std::string& job) {
  MutexLock lock(&account_->mutex);
  for (auto& [use, counts] : account_->uses) counts.forgotten |= use.job == job;
  std::erase_if(account_->uses, [](const auto& entry) {
    return entry.second.forgotten && entry.second.pools == 0;
  });
}

}  // namespace orlop::server
