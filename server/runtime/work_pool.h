// Threads that stage, apply and flush shards for every job of the server, first come first served.
#pragma once

#include <spdlog/spdlog.h>

#include <deque>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "base/thread_pool.h"
#include "base/mutex.h"

namespace orlop::server {

// The queue is bounded by what the step machines have in hand: at most one task per shard.
// Threads: Submit from any thread.
class WorkPool {
 public:
  // The threads run on `cpus`; empty: anywhere.
  explicit WorkPool(int thread_count, const std::vector<int>& cpus = {}) {
    for (int i = 0; i < thread_count; ++i)
      threads_.emplace_back([this, cpus] {
        if (absl::Status pinned = kernels::PinThisThread(cpus); !pinned.ok())
          spdlog::warn("--cpus: {}", std::string(pinned.message()));
        Loop();
      });
  }
  ~WorkPool() { Stop(); }

  void Submit(std::function<void()> task) {
    MutexLock lock(&mutex_);
    tasks_.push_back(std::move(task));
    changed_.Signal();
  }

  // Runs what was submitted, then joins the threads. Idempotent.
  void Stop() {
    {
      MutexLock lock(&mutex_);
      stopping_ = true;
      changed_.SignalAll();
    }
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
  }

 private:
  void Loop() {
    while (true) {
      std::function<void()> task;
      {
        MutexLock lock(&mutex_);
        while (tasks_.empty() && !stopping_) changed_.Wait(&mutex_);
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
    }
  }

  Mutex mutex_;
  CondVar changed_;
  std::deque<std::function<void()>> tasks_ GUARDED_BY(mutex_);
  bool stopping_ GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace orlop::server
