// The lock type of Orlop: std::mutex with clang's thread-safety annotations. (The thread sanitizer
// cannot see into a packaged, uninstrumented absl::Mutex.)
// https://clang.llvm.org/docs/ThreadSafetyAnalysis.html
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

// It defines ABSL_GUARDED_BY and, in some releases, GUARDED_BY too.
#include "absl/base/thread_annotations.h"  // IWYU pragma: export

#ifdef ORLOP_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
#endif

#if defined(__clang__)
#define ORLOP_ANNOTATION(x) __attribute__((x))
#else
#define ORLOP_ANNOTATION(x)
#endif

#ifndef GUARDED_BY
#define GUARDED_BY(x) ABSL_GUARDED_BY(x)
#define PT_GUARDED_BY(x) ABSL_PT_GUARDED_BY(x)
#define NO_THREAD_SAFETY_ANALYSIS ABSL_NO_THREAD_SAFETY_ANALYSIS
#endif
#define CAPABILITY(x) ORLOP_ANNOTATION(capability(x))
#define SCOPED_CAPABILITY ORLOP_ANNOTATION(scoped_lockable)
#define REQUIRES(...) ORLOP_ANNOTATION(requires_capability(__VA_ARGS__))
#define EXCLUDES(...) ORLOP_ANNOTATION(locks_excluded(__VA_ARGS__))
#define ACQUIRE(...) ORLOP_ANNOTATION(acquire_capability(__VA_ARGS__))
#define RELEASE(...) ORLOP_ANNOTATION(release_capability(__VA_ARGS__))

namespace orlop {

// Tells the thread sanitizer of each lock of a Mutex, and does nothing without it. Our tests set
// ignore_noninstrumented_modules, under which GCC's sanitizer drops every report from an
// interceptor. One from pthread_mutex_lock about a wrong lock order is among them; one from these
// calls is not.
class ToldLock {
 public:
#ifdef ORLOP_THREAD_SANITIZER
  ~ToldLock() { __tsan_mutex_destroy(&address_, 0); }
  void BeforeLock() { __tsan_mutex_pre_lock(&address_, 0); }
  void AfterLock() { __tsan_mutex_post_lock(&address_, 0, 0); }
  void BeforeUnlock() { __tsan_mutex_pre_unlock(&address_, 0); }
  void AfterUnlock() { __tsan_mutex_post_unlock(&address_, 0); }

 private:
  char address_ = 0;  // stands for the lock
#else
  void BeforeLock() {}
  void AfterLock() {}
  void BeforeUnlock() {}
  void AfterUnlock() {}
#endif
};

class CAPABILITY("mutex") Mutex {
 public:
  void Lock() ACQUIRE() {
    told_.BeforeLock();
    mutex_.lock();
    told_.AfterLock();
    takes_.store(takes_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }
  void Unlock() RELEASE() {
    told_.BeforeUnlock();
    mutex_.unlock();
    told_.AfterUnlock();
  }
  // How often Lock was called: for tests and benchmarks that count.
  uint64_t takes() const { return takes_.load(std::memory_order_relaxed); }

 private:
  friend class CondVar;
  // Tells of a lock that a wait of CondVar gives up, or has taken again.
  void TellUnlocked() {
    told_.BeforeUnlock();
    told_.AfterUnlock();
  }
  void TellLocked() {
    told_.BeforeLock();
    told_.AfterLock();
  }

  std::mutex mutex_;
  [[no_unique_address]] ToldLock told_;
  std::atomic<uint64_t> takes_ = 0;  // written under mutex_
};

class SCOPED_CAPABILITY MutexLock {
 public:
  explicit MutexLock(Mutex* mutex) ACQUIRE(mutex) : mutex_(mutex) { mutex_->Lock(); }
  ~MutexLock() RELEASE() { mutex_->Unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex* mutex_;
};

// Condition variable for Mutex. A wait releases the mutex held by a MutexLock and locks it again
// before it returns. Spurious wake-ups happen, so wait in a loop.
class CondVar {
 public:
  void Wait(Mutex* mutex) REQUIRES(mutex) {
    std::unique_lock<std::mutex> lock(mutex->mutex_, std::adopt_lock);
    mutex->TellUnlocked();
    condition_.wait(lock);
    mutex->TellLocked();
    lock.release();
  }
  // Returns false if the deadline has passed.
  bool WaitUntil(Mutex* mutex, std::chrono::steady_clock::time_point deadline) REQUIRES(mutex) {
    std::unique_lock<std::mutex> lock(mutex->mutex_, std::adopt_lock);
    // Waits on the system clock: older thread sanitizers do not know pthread_cond_clockwait, which
    // the steady clock uses.
    const auto left = deadline - std::chrono::steady_clock::now();
    mutex->TellUnlocked();
    const bool in_time = condition_.wait_until(lock, std::chrono::system_clock::now() + left) ==
                         std::cv_status::no_timeout;
    mutex->TellLocked();
    lock.release();
    return in_time;
  }
  void Signal() { condition_.notify_one(); }
  void SignalAll() { condition_.notify_all(); }

 private:
  std::condition_variable condition_;
};

}  // namespace orlop
