// Cancels calls whose client does not read what the server writes. Such a call holds the buffers
// that it sends, and an apply may need that memory.
//   Threads  all methods are safe from any thread.
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <utility>

#include "base/mutex.h"
#include "proto/limits.h"

namespace orlop::server {

class StallWatch {
 public:
  using Clock = std::chrono::steady_clock;

  // Lives as long as one write that may block. `cancel` must make the write return soon, and must
  // not block: Tick calls it under the watch's lock, again with every Tick until the write returns.
  class Write {
   public:
    Write(StallWatch* watch, std::function<void()> cancel, Clock::time_point now = Clock::now())
        : watch_(watch) {
      MutexLock lock(&watch_->mutex_);
      watch_->writes_.emplace(this, Begun{now, std::move(cancel)});
    }
    ~Write() {
      MutexLock lock(&watch_->mutex_);
      watch_->writes_.erase(this);
    }
    Write(const Write&) = delete;
    Write& operator=(const Write&) = delete;

   private:
    StallWatch* const watch_;
  };

  // Cancels every write that began kMaxStallMs ago or earlier. The server's ticker calls it.
  void Tick(Clock::time_point now = Clock::now()) {
    MutexLock lock(&mutex_);
    for (auto& [write, begun] : writes_)
      if (now - begun.at >= std::chrono::milliseconds(kMaxStallMs)) begun.cancel();
  }

 private:
  struct Begun {
    Clock::time_point at;
    std::function<void()> cancel;
  };
  Mutex mutex_;
  std::map<const Write*, Begun> writes_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
