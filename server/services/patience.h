// Repeats an attempt whose answer is *later* (ARCHITECTURE.md, "Words") until the answer is another
// one, without a thread that waits.
#pragma once

#include <grpcpp/alarm.h>

#include <chrono>
#include <functional>
#include <memory>

#include "base/mutex.h"
#include "base/thread_pool.h"
#include "server/runtime/wait.h"

namespace orlop::server {

class Patience : public std::enable_shared_from_this<Patience> {
 public:
  // Makes an attempt, and returns whether that was the end. If not, who answered *later* has kept
  // `wakeup`. `is_last`: the deadline has come, so this attempt must be the end.
  using Attempt = std::function<bool(const std::shared_ptr<Wakeup>& wakeup, bool is_last)>;

  // Makes the first attempt here, and others on `threads` when the wakeup is woken, and at
  // `deadline`.
  static void Begin(ThreadPool* threads, std::chrono::steady_clock::time_point deadline,
                    Attempt attempt);

 private:
  Patience(ThreadPool* threads, std::chrono::steady_clock::time_point deadline, Attempt attempt)
      : threads_(threads), deadline_(deadline), attempt_(std::move(attempt)) {}
  void Try();
  void Wake();

  ThreadPool* const threads_;
  const std::chrono::steady_clock::time_point deadline_;
  Attempt attempt_;  // empty after the end
  std::shared_ptr<Wakeup> wakeup_;
  std::unique_ptr<grpc::Alarm> alarm_;  // at the deadline; made with the first sleep
  Mutex mutex_;
  bool is_asleep_ GUARDED_BY(mutex_) = false;
  bool was_woken_ GUARDED_BY(mutex_) = false;  // since the attempt under way began
};

}  // namespace orlop::server
