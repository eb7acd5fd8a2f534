#include "server/services/patience.h"

#include <chrono>
#include <memory>
#include <utility>

#include "base/mutex.h"
#include "base/thread_pool.h"
#include "server/runtime/wait.h"

namespace orlop::server {

void Patience::Begin(ThreadPool* threads, std::chrono::steady_clock::time_point deadline,
                     Attempt attempt) {
  const std::shared_ptr<Patience> patience(new Patience(threads, deadline, std::move(attempt)));
  // The job keeps the wakeup, maybe for long, so the wakeup must not keep what the attempt uses.
  patience->wakeup_ = std::make_shared<Wakeup>([weak = patience->weak_from_this()] {
    if (const auto self = weak.lock()) self->Wake();
  });
  patience->Try();
}

void Patience::Try() {
  const std::shared_ptr<Patience> self = shared_from_this();
  for (;;) {
    {
      MutexLock lock(&mutex_);
      was_woken_ = false;
    }
    const bool is_last = std::chrono::steady_clock::now() >= deadline_;
    if (attempt_(wakeup_, is_last) || is_last) {
      if (alarm_ != nullptr) alarm_->Cancel();
      attempt_ = nullptr;
      return;
    }
    if (alarm_ == nullptr) {
      alarm_ = std::make_unique<grpc::Alarm>();
      const auto left = deadline_ - std::chrono::steady_clock::now();
      alarm_->Set(std::chrono::system_clock::now() + left, [self](bool) { self->Wake(); });
    }
    MutexLock lock(&mutex_);
    if (was_woken_) continue;
    is_asleep_ = true;
    return;
  }
}

void Patience::Wake() {
  {
    MutexLock lock(&mutex_);
    was_woken_ = true;
    if (!std::exchange(is_asleep_, false)) return;
  }
  threads_->Submit([self = shared_from_this()] { self->Try(); });
}

}  // namespace orlop::server
