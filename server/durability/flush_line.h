// Flushes of different jobs wait in line. They would fill the same disk in the same time side by
// side, but share files of the store: the space of an erased flush is free only once all flushes
// in its files are erased.
//   Threads  All methods are safe from any thread.
#pragma once

#include <deque>
#include <functional>
#include <utility>

#include "base/mutex.h"
#include "base/thread_pool.h"

namespace orlop::server {

class FlushLine {
 public:
  // Runs `write` in the pool when all calls before it have ended. The line and the pool must
  // outlive it.
  void Submit(ThreadPool* pool, std::function<void()> write) {
    {
      MutexLock lock(&mutex_);
      waiting_.push_back(std::move(write));
      if (std::exchange(is_writing_, true)) return;
    }
    pool->Submit([this, pool] { WriteNext(pool); });
  }

 private:
  void WriteNext(ThreadPool* pool) {
    std::function<void()> write;
    {
      MutexLock lock(&mutex_);
      write = std::move(waiting_.front());
      waiting_.pop_front();
    }
    write();
    {
      MutexLock lock(&mutex_);
      is_writing_ = !waiting_.empty();
      if (!is_writing_) return;
    }
    pool->Submit([this, pool] { WriteNext(pool); });
  }

  Mutex mutex_;
  bool is_writing_ GUARDED_BY(mutex_) = false;
  std::deque<std::function<void()>> waiting_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
