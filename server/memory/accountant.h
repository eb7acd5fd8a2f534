// The accountant counts all large memory of the process, and the disk space of spilled slots. The
// buffers here are that memory.
//
// Bytes are first reserved, which counts them against the limit of their tier. They are used once a
// buffer is allocated from the reservation. For each tier, used <= reserved <= limit at any time.
// Bytes that are reserved but not used take no memory of the system. The pages of freed buffers are
// idle until another buffer takes them (BufferPool); in DRAM, used + idle <= limit at any time.
//   Threads  An Accountant is safe from any thread. A Reservation has one owner. A Buffer has one
//            writer, its owner; any thread may read and free it.
//   Locks    One lock, which is taken last. Nothing here waits, and nothing is mapped or unmapped
//            under it.
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

// A Use is what bytes are reserved for. `slot` is the name of a slot, or "staging", "apply",
// "lanes", "lists", "layout", "rocksdb", "requests" or "messages".
struct Use {
  Tier tier = Tier::kDram;
  std::string job;  // empty: the server itself
  std::string slot;
  friend auto operator<=>(const Use&, const Use&) = default;
};

// UsedBytes has the bytes of one use, as Accountant::Snapshot returns them.
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

// A Buffer is a block of memory. Above 16 KiB it has pages of its own: idle ones of the accountant,
// or new ones of the system. A smaller one comes from malloc. The owner writes a buffer; others
// that share it as a BufferPtr only read it.
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

  // Returns the bytes that a buffer of this size counts as: a multiple of 4 KiB, or of 64 bytes up
  // to 16 KiB.
  static uint64_t Footprint(uint64_t size_bytes);

 private:
  friend class Reservation;
  Buffer(std::shared_ptr<internal::Pool> pool, uint8_t* data, uint64_t size);
  std::shared_ptr<internal::Pool> pool_;
  uint8_t* data_;
  uint64_t size_;
};
using BufferPtr = std::shared_ptr<Buffer>;

// What a new buffer holds. Of a buffer that is kNothing, every byte must be written before it is
// read: it may have bytes of another job.
enum class Fill : uint8_t { kZeros, kNothing };

// A Reservation owns bytes of one use. Its destructor gives back the bytes that no buffer uses;
// each of its buffers gives back its own bytes when it is freed, which may be later. A default
// reservation has no bytes.
class Reservation {
 public:
  Reservation() = default;
  Reservation(Reservation&&) = default;
  Reservation& operator=(Reservation&& other) noexcept;
  ~Reservation();

  uint64_t reserved_bytes() const;  // the used ones included
  uint64_t used_bytes() const;
  // Returns a buffer of these bytes, aligned to 64 bytes at least. It uses
  // Buffer::Footprint(size_bytes).
  //   Status  ResourceExhausted (BUDGET): too few bytes are left, or the system has no memory; the
  //           message names the use
  absl::StatusOr<BufferPtr> Allocate(uint64_t size_bytes, Fill fill = Fill::kZeros);
  // Sets how many bytes are used by something other than buffers (a file, a library's memory). This
  // replaces the number of the last call.
  //   Status  ResourceExhausted: more than is reserved and free; the number stays
  absl::Status SetUsed(uint64_t bytes);
  // Gives back the bytes that are not used.
  void Trim();
  // Gives back unused bytes until `bytes` are reserved, or as many as are used. It has no effect if
  // fewer are reserved.
  void ShrinkTo(uint64_t bytes);

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

  // Reserves exactly `bytes`. For a buffer, the caller passes its Buffer::Footprint.
  //   Status  ResourceExhausted (ErrorDetail BUDGET, `limit` is that of the tier): nothing is
  //           reserved; the message names the use, the bytes asked for, the free ones and the limit
  absl::StatusOr<Reservation> Reserve(const Use& use, uint64_t bytes);

  // Grows a reservation to `bytes`. It has no effect if the reservation has as many already. `use`
  // is that of the reservation; a default reservation gets it.
  //   Status  as Reserve; the reservation keeps what it has
  absl::Status Grow(Reservation* reservation, const Use& use, uint64_t bytes);

  uint64_t limit_bytes(Tier tier) const;
  uint64_t free_bytes(Tier tier) const;  // the bytes of the limit that are not reserved
  uint64_t reserved_bytes(Tier tier) const;
  uint64_t used_bytes(Tier tier) const;
  uint64_t peak_bytes(Tier tier) const;  // highest used_bytes since start
  uint64_t idle_bytes() const;           // of freed buffers, in DRAM
  // Gives back to the system the pages that have been idle for two seconds. Somebody calls it about
  // every quarter of a second.
  void GiveBackIdle();
  // Returns every use that has or had bytes and was not forgotten, by (tier, job, slot).
  std::vector<UsedBytes> Snapshot() const;
  // Removes the uses of a deleted job from later snapshots. A use that still has a reservation or a
  // buffer is removed with the last of them, unless bytes are reserved for it again before that.
  void Forget(const std::string& job);

 private:
  friend class Reservation;
  std::shared_ptr<internal::Account> account_;
};

}  // namespace orlop::server
