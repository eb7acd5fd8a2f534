// How a call waits for a job: in its own thread, without a lock of the job.
#pragma once

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>

#include "base/mutex.h"

namespace orlop::server {

// How long a caller waits, and how it says that it has gone away.
struct Wait {
  std::chrono::steady_clock::time_point deadline;
  std::function<bool()> cancelled;  // empty: never

  bool is_over() const {
    return std::chrono::steady_clock::now() >= deadline || (cancelled && cancelled());
  }
};

// Synchronous gRPC says that a call was cancelled only when it is asked.
inline constexpr std::chrono::milliseconds kCancelPoll(200);

// Wakes one caller whom a job has answered *later*. Threads: any.
class Wakeup {
 public:
  void Wake() {
    MutexLock lock(&mutex_);
    is_awake_ = true;
    awake_.SignalAll();
  }
  // Returns after a Wake since the last Sleep, or at `until`.
  void Sleep(std::chrono::steady_clock::time_point until) {
    MutexLock lock(&mutex_);
    while (!is_awake_ && awake_.WaitUntil(&mutex_, until)) {
    }
    is_awake_ = false;
  }

 private:
  Mutex mutex_;
  CondVar awake_;
  bool is_awake_ GUARDED_BY(mutex_) = false;
};

// Asks until the answer is not *later* any more, or the wait is over: then returns the last answer.
// `ask(wakeup)` never blocks. Its result has `is_later`; if that is set, the job has kept the
// wake-up and wakes it when its state has changed.
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
