// How the thread of a call waits until a job can answer it. No lock of the job is held meanwhile.
#pragma once

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <utility>

#include "base/mutex.h"

namespace orlop::server {

// How long a caller waits, and whether it has gone away.
struct Wait {
  std::chrono::steady_clock::time_point deadline;
  std::function<bool()> cancelled;  // empty: never

  bool is_over() const {
    return std::chrono::steady_clock::now() >= deadline || (cancelled && cancelled());
  }
};

// A waiting call asks this often whether it was cancelled, since synchronous gRPC does not tell.
inline constexpr std::chrono::milliseconds kCancelPoll(200);

// Wakes one caller whom a job has answered *later* (ARCHITECTURE.md, "Words").
//   Threads  one thread calls Sleep; any thread may call Wake.
class Wakeup {
 public:
  // `on_wake` runs with each Wake, maybe under a lock of the job, and must not wait.
  explicit Wakeup(std::function<void()> on_wake = nullptr) : on_wake_(std::move(on_wake)) {}

  void Wake() {
    {
      MutexLock lock(&mutex_);
      is_awake_ = true;
      awake_.SignalAll();
    }
    if (on_wake_) on_wake_();
  }
  // Returns at once if Wake was called since the last Sleep; else waits for Wake or until `until`.
  void Sleep(std::chrono::steady_clock::time_point until) {
    MutexLock lock(&mutex_);
    while (!is_awake_ && awake_.WaitUntil(&mutex_, until)) {
    }
    is_awake_ = false;
  }

 private:
  const std::function<void()> on_wake_;
  Mutex mutex_;
  CondVar awake_;
  bool is_awake_ GUARDED_BY(mutex_) = false;
};

// Calls `ask(wakeup)` until its answer is not *later* or the wait is over, and returns the last
// answer. `ask` must not block. Its result has a field `is_later`; if that is true, the job has
// kept `wakeup` and calls Wake when its state has changed.
template <typename Ask>
auto AskUntilAnswered(const Wait& wait, Ask ask) {
  const auto wakeup = std::make_shared<Wakeup>();
  for (;;) {
    auto answer = ask(wakeup);
    if (!answer.is_later || wait.is_over()) return answer;
    wakeup->Sleep(std::min(wait.deadline, std::chrono::steady_clock::now() + kCancelPoll));
  }
}

}  // namespace orlop::server
