// One accountant for all large memory of the process, and the buffers it counts.
//
// Bytes are first reserved (promised against the hard limit of their tier), then used by allocating
// buffers from the reservation. Always: used <= reserved <= limit, per tier. What is reserved but
// not yet used costs no memory.
//   Threads  everything here is safe from any thread, but a Reservation or Buffer object itself,
//   which has one owner.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/mutex.h"

namespace orlop::server {

enum class Tier : uint8_t { kDram, kNvme };
const char* TierName(Tier tier);  // "DRAM", "NVME"

// What bytes are for. `slot`: a slot's name, or "staging", "apply", "lanes", "lists", "rocksdb",
// "messages".
struct Use {
  Tier tier = Tier::kDram;
  std::string job;  // empty: the server itself
  std::string slot;
  friend auto operator<=>(const Use&, const Use&) = default;
};

struct UsedBytes {
  Use use;
  uint64_t reserved_bytes = 0;
  uint64_t used_bytes = 0;
  uint64_t peak_bytes = 0;  // highest used_bytes since start
};

class Accountant;
namespace internal {
struct Account;
struct Pool;
}  // namespace internal

// Bytes of memory: whole pages of their own (mmap) above 16 KiB, so that freed memory goes back to
// the system at once. Smaller ones come from malloc. Written by their owner, shared read-only as
// BufferPtr.
class Buffer {
 public:
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint8_t* data() { return data_; }
  const uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }
  absl::Span<const uint8_t> bytes() const { return {data_, size_}; }
  template <typename T>
  absl::Span<T> as() {
    return {reinterpret_cast<T*>(data_), size_ / sizeof(T)};
  }
  template <typename T>
  absl::Span<const T> as() const {
    return {reinterpret_cast<const T*>(data_), size_ / sizeof(T)};
  }

  // What a buffer of this size counts as: rounded up to pages, or to 64 bytes below 16 KiB.
  static uint64_t Footprint(uint64_t size_bytes);

 private:
  friend class Reservation;
  Buffer(std::shared_ptr<internal::Pool> pool, uint8_t* data, uint64_t size);
  std::shared_ptr<internal::Pool> pool_;
  uint8_t* data_;
  uint64_t size_;
};
using BufferPtr = std::shared_ptr<Buffer>;

// Promised bytes; given back when destroyed, those of living buffers when each of them dies.
// Default: no bytes.
class Reservation {
 public:
  Reservation() = default;
  Reservation(Reservation&&) = default;
  Reservation& operator=(Reservation&& other);
  ~Reservation();

  uint64_t reserved_bytes() const;
  uint64_t used_bytes() const;
  // A buffer from these bytes, contents zero. ResourceExhausted if the reservation is used up,
  // naming it.
  absl::StatusOr<BufferPtr> Allocate(uint64_t size_bytes);
  // Counts bytes that live elsewhere (a file, a library's memory) as used until the next call or
  // the end. Not more than reserved.
  absl::Status SetUsed(uint64_t bytes);
  // Gives back all that is not used.
  void Trim();

 private:
  friend class Accountant;
  std::shared_ptr<internal::Pool> pool_;
};

class Accountant {
 public:
  struct Limits {
    uint64_t dram_bytes = 0;
    uint64_t nvme_bytes = 0;  // 0: nothing may spill
  };
  explicit Accountant(Limits limits);
  ~Accountant();

  // Promises bytes (Buffer::Footprint is the caller's to apply). ResourceExhausted (ErrorDetail
  // BUDGET, `limit` the tier's bytes) names the use, the bytes asked, those free, and the limit;
  // nothing is promised then.
  absl::StatusOr<Reservation> Reserve(const Use& use, uint64_t bytes);

  // Promises what is missing of `bytes` to a reservation, which keeps what it has if that is
  // refused; an empty one is made as by Reserve. Enough already: no effect.
  absl::Status Grow(Reservation* reservation, const Use& use, uint64_t bytes);

  uint64_t limit_bytes(Tier tier) const;
  uint64_t free_bytes(Tier tier) const;  // not reserved
  uint64_t reserved_bytes(Tier tier) const;
  uint64_t used_bytes(Tier tier) const;
  uint64_t peak_bytes(Tier tier) const;  // highest used_bytes since start
  // Every use that has or had bytes, in order of (tier, job, slot), without forgotten ones.
  std::vector<UsedBytes> Snapshot() const;
  // Forgets the uses of a deleted job: one that still has a reservation or a buffer is forgotten
  // with the last of them, unless a new reservation is made for it before.
  void Forget(const std::string& job);

 private:
  friend class Reservation;
  std::shared_ptr<internal::Account> account_;
};

}  // namespace orlop::server
