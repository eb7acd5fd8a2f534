// A unary call that may wait for its job. While it waits it holds no thread, so any number of
// workers can wait for one another.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/runtime/job_table.h"

namespace orlop::server {

// Made by a handler of gRPC's callback API, which returns it; deletes itself after its end. A
// client that goes away withdraws the request that the call waits for. At most kMaxWaitingCalls
// live at a time.
//   Threads  The handler's until it asks; then the one that runs `next`, and so on.
class WaitingCall final : public grpc::ServerUnaryReactor {
 public:
  // The call waits until its own deadline, but at most ten minutes.
  explicit WaitingCall(grpc::CallbackServerContext* context);
  ~WaitingCall() override { --live_; }

  // ResourceExhausted (BUDGET): too many calls wait. End then.
  absl::Status CheckLimit() const;
  // Begins a request at the job's leader, and calls `next` with the answer: here, or later in
  // another thread. `next` asks again or ends the call. Nothing may touch the call after Ask.
  void Ask(const std::shared_ptr<JobRuntime>& job,
           const std::function<step::RequestId(LeaderShell&, Caller)>& ask,
           std::function<void(absl::StatusOr<step::Answer>)> next);
  // Ends the call; the response is sent if `status` is OK. Returns the call, for the handler.
  grpc::ServerUnaryReactor* End(const absl::Status& status);

 private:
  // The request that the call waits for. It outlives the call, which may end while it is begun.
  class Pending {
   public:
    int Begin();
    // `withdraw` ends the wait of request number `request`, unless another one has begun since.
    void Set(int request, std::function<void()> withdraw);
    void Cancel();

   private:
    Mutex mutex_;
    int requests_ GUARDED_BY(mutex_) = 0;
    bool is_cancelled_ GUARDED_BY(mutex_) = false;
    std::function<void()> withdraw_ GUARDED_BY(mutex_);
  };

  void OnCancel() override { pending_->Cancel(); }
  void OnDone() override { delete this; }

  static std::atomic<int> live_;

  const std::chrono::steady_clock::time_point deadline_;
  const std::shared_ptr<Pending> pending_ = std::make_shared<Pending>();
};

}  // namespace orlop::server
