// The RequestRoom bounds the memory of the requests of control calls, and of their responses, while
// the calls are in progress. What a request takes once it is parsed is counted before it is parsed
// (proto/parse_bound.h).
//
// A part of the room is reserved for the life of the server, so that an operator is answered
// however full the memory is. A request that needs more takes it from the server's budget.
//   Threads  all methods are safe from any thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/memory/accountant.h"

namespace orlop::server {

class RequestRoom {
 public:
  // Reserves `bytes` of the server's budget, or returns ResourceExhausted.
  using Reserve = std::function<absl::StatusOr<Reservation>(uint64_t bytes)>;

  // Returns the bytes that are reserved for the life of a server with this memory budget.
  static uint64_t FixedBytesFor(uint64_t budget_bytes) {
    return std::clamp<uint64_t>(budget_bytes / 128, uint64_t{512} << 10, uint64_t{32} << 20);
  }
  // Returns the most bytes that all calls in progress may take.
  static uint64_t MostBytesFor(uint64_t budget_bytes) {
    return std::max<uint64_t>(budget_bytes / 4, uint64_t{32} << 20);
  }

  // The same for calls of peers, whose messages may have 64 MiB.
  static uint64_t MostBytesOfPeersFor(uint64_t budget_bytes) {
    return std::max<uint64_t>(budget_bytes / 2, uint64_t{64} << 20);
  }

  // `fixed` is the part that is reserved for good, `most_bytes` the limit of all calls together.
  RequestRoom(Reservation fixed, uint64_t most_bytes, Reserve reserve)
      : fixed_bytes_(fixed.reserved_bytes()),
        most_bytes_(most_bytes),
        reserve_(std::move(reserve)),
        fixed_(std::move(fixed)) {}

  // The bytes of one request or response. It must not outlive the room.
  class Held {
   public:
    Held() = default;
    Held(Held&& other) noexcept
        : room_(std::exchange(other.room_, nullptr)),
          bytes_(other.bytes_),
          extra_(std::move(other.extra_)),
          is_fixed_(other.is_fixed_) {}
    Held& operator=(Held&& other) noexcept {
      std::swap(room_, other.room_);
      std::swap(bytes_, other.bytes_);
      std::swap(extra_, other.extra_);
      std::swap(is_fixed_, other.is_fixed_);
      return *this;
    }
    ~Held() {
      if (room_ != nullptr) room_->Return(bytes_, is_fixed_);
    }

   private:
    friend class RequestRoom;
    RequestRoom* room_ = nullptr;
    uint64_t bytes_ = 0;
    Reservation extra_;
    bool is_fixed_ = false;
  };

  // Takes bytes for one request or response. May wait for the disk if memory is short.
  //   Status  ResourceExhausted (BUSY): the calls in progress, or all of the server, take too much,
  //           and a later call may find room. InvalidArgument (BAD_REQUEST): the room is smaller
  //           than that.
  absl::StatusOr<Held> Take(uint64_t bytes) {
    if (bytes > most_bytes_)
      return MakeError(absl::StatusCode::kInvalidArgument,
                       absl::StrCat("a message takes ", bytes, " bytes; the limit is ", most_bytes_,
                                    ", a quarter of --memory"),
                       v1::ErrorDetail::BAD_REQUEST);
    Held held;
    {
      MutexLock lock(&mutex_);
      if (bytes > most_bytes_ - taken_bytes_)
        return MakeError(absl::StatusCode::kResourceExhausted,
                         absl::StrCat("a message takes ", bytes,
                                      " bytes; the calls in progress "
                                      "have ",
                                      taken_bytes_, " of ", most_bytes_),
                         v1::ErrorDetail::BUSY);
      taken_bytes_ += bytes;
      held.is_fixed_ = bytes <= fixed_bytes_ - fixed_taken_bytes_;
      if (held.is_fixed_) {
        fixed_taken_bytes_ += bytes;
        fixed_.SetUsed(fixed_taken_bytes_).IgnoreError();  // cannot fail: that much is reserved
      }
      held.room_ = this;
      held.bytes_ = bytes;
    }
    if (held.is_fixed_) return held;
    absl::StatusOr<Reservation> extra = reserve_(bytes);
    if (!extra.ok())
      return MakeError(extra.status().code(), std::string(extra.status().message()),
                       v1::ErrorDetail::BUSY);
    extra->SetUsed(bytes).IgnoreError();  // cannot fail: that much is reserved
    held.extra_ = *std::move(extra);
    return held;
  }

 private:
  void Return(uint64_t bytes, bool is_fixed) {
    MutexLock lock(&mutex_);
    taken_bytes_ -= bytes;
    if (!is_fixed) return;
    fixed_taken_bytes_ -= bytes;
    fixed_.SetUsed(fixed_taken_bytes_).IgnoreError();
  }

  const uint64_t fixed_bytes_, most_bytes_;
  const Reserve reserve_;
  Mutex mutex_;
  Reservation fixed_ GUARDED_BY(mutex_);
  uint64_t taken_bytes_ GUARDED_BY(mutex_) = 0;
  uint64_t fixed_taken_bytes_ GUARDED_BY(mutex_) = 0;
};

}  // namespace orlop::server
