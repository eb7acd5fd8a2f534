// The ReadRoom bounds the memory in which pulls build what they send, and into which they read what
// is on disk, so that those who read do not push the state of those who train out of memory.
//
// A pull that finds the room full is refused, and its client calls again. Nobody waits here, for
// those who have the room may take nothing for long; a pull that does is ended sooner while others
// want the room.
//   Threads  all methods are safe from any thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"

namespace orlop::server {

class ReadRoom {
 public:
  // Returns the bytes of the room for a server with this memory budget.
  static uint64_t BytesFor(uint64_t budget_bytes) {
    return std::max<uint64_t>(budget_bytes / 8, 4 * kMaxChunkBytes);
  }

  explicit ReadRoom(uint64_t most_bytes) : most_bytes_(most_bytes) {}

  // The bytes of one pull. It must not outlive the room.
  class Held {
   public:
    explicit Held(ReadRoom* room) : room_(room) {}
    ~Held() { room_->taken_bytes_ -= bytes_; }
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;

    // Takes as much as is missing to `bytes`. A pull begins only in the first half of the room, so
    // that one that has begun seldom ends for want of room. One that needs more than half of what
    // it may have is let in as if it needed half, so that small ones do not keep it out.
    //   Status  ResourceExhausted (BUSY)
    absl::Status Grow(uint64_t bytes);
    // Whether others were refused the room of this pull lately.
    bool is_wanted() const { return bytes_ > 0 && NowMs() - room_->refused_ms_ < kWantedMs; }

   private:
    ReadRoom* const room_;
    std::atomic<uint64_t> bytes_ = 0;
  };

 private:
  static constexpr int64_t kWantedMs = 5'000;
  static int64_t NowMs() {
    return std::chrono::duration_cast<std::chrono::milliseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }

  const uint64_t most_bytes_;
  std::atomic<uint64_t> taken_bytes_ = 0;
  std::atomic<int64_t> refused_ms_ = -kWantedMs;  // of the steady clock
};

inline absl::Status ReadRoom::Held::Grow(uint64_t bytes) {
  const uint64_t own = bytes_;
  if (bytes <= own) return absl::OkStatus();
  const uint64_t limit = own > 0 ? room_->most_bytes_ : room_->most_bytes_ / 2;
  uint64_t taken = room_->taken_bytes_;
  do {
    if (taken - own + std::min(bytes, limit / 2) <= limit) continue;
    room_->refused_ms_ = NowMs();
    return MakeError(absl::StatusCode::kResourceExhausted,
                     absl::StrCat("a pull needs ", bytes,
                                  " bytes of memory to build what it sends; others have ",
                                  taken - own, " of ", limit, ": call again"),
                     v1::ErrorDetail::BUSY);
  } while (!room_->taken_bytes_.compare_exchange_weak(taken, taken - own + bytes));
  bytes_ = bytes;
  return absl::OkStatus();
}

}  // namespace orlop::server
