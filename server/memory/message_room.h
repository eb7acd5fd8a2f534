// The MessageRoom bounds the memory of messages that calls have received and not yet copied to
// their destination.
//
// A call that finds the room full waits, with its one message. Meanwhile gRPC's flow control stops
// the sender.
//   Threads  all methods are safe from any thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "base/mutex.h"
#include "proto/limits.h"
#include "server/memory/accountant.h"

namespace orlop::server {

class MessageRoom {
 public:
  // Returns the bytes of the room for a server with this memory budget: a 64th of the budget, at
  // least one message of the largest size, at most 64 MiB.
  static uint64_t BytesFor(uint64_t budget_bytes) {
    return std::clamp<uint64_t>(budget_bytes / 64, kMaxMessageBytes, uint64_t{64} << 20);
  }

  explicit MessageRoom(Reservation room)
      : room_(std::move(room)), limit_bytes_(room_.reserved_bytes()) {}

  // A Held counts one message. It must not outlive the room.
  class Held {
   public:
    // Waits until the room has `bytes` left. A message larger than the room takes all of it.
    Held(MessageRoom* room, uint64_t bytes)
        : room_(room), bytes_(std::min(bytes, room->limit_bytes_)) {
      room_->Take(bytes_);
    }
    ~Held() { room_->Return(bytes_); }
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;

   private:
    MessageRoom* const room_;
    const uint64_t bytes_;
  };

  // Returns the number of messages that were counted so far.
  uint64_t message_count() const {
    MutexLock lock(&mutex_);
    return message_count_;
  }

 private:
  void Take(uint64_t bytes) {
    MutexLock lock(&mutex_);
    while (bytes > limit_bytes_ - used_bytes_) returned_.Wait(&mutex_);
    ++message_count_;
    used_bytes_ += bytes;
    room_.SetUsed(used_bytes_).IgnoreError();  // cannot fail: it is within what is reserved
  }
  void Return(uint64_t bytes) {
    MutexLock lock(&mutex_);
    used_bytes_ -= bytes;
    room_.SetUsed(used_bytes_).IgnoreError();
    returned_.SignalAll();
  }

  mutable Mutex mutex_;
  CondVar returned_;
  Reservation room_ GUARDED_BY(mutex_);
  const uint64_t limit_bytes_;
  uint64_t used_bytes_ GUARDED_BY(mutex_) = 0;
  uint64_t message_count_ GUARDED_BY(mutex_) = 0;
};

}  // namespace orlop::server
