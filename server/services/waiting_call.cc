#include "server/services/waiting_call.h"

#include <atomic>
#include <functional>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/runtime/answers.h"
#include "server/runtime/job_table.h"
#include "server/step/actions.h"

namespace orlop::server {

std::atomic<int> WaitingCall::live_ = 0;

WaitingCall::WaitingCall(grpc::CallbackServerContext* context) : deadline_(DeadlineOf(*context)) {
  ++live_;
}

absl::Status WaitingCall::CheckLimit() const {
  if (live_ <= kMaxWaitingCalls) return absl::OkStatus();
  return MakeError(absl::StatusCode::kResourceExhausted,
                   absl::StrCat("the limit is ", kMaxWaitingCalls,
                                " calls of Join, CommitStep and AbortStep at a time"),
                   v1::ErrorDetail::BUDGET);
}

void WaitingCall::Ask(const std::shared_ptr<JobRuntime>& job,
                      const std::function<step::RequestId(LeaderShell&, Caller)>& ask,
                      std::function<void(absl::StatusOr<step::Answer>)> next) {
  const std::shared_ptr<Pending> pending = pending_;  // `next` may end the call in here
  const int number = pending->Begin();
  const step::RequestId request = ask(*job->leader(), {std::move(next), deadline_});
  pending->Set(number, [job, request] {
    job->leader()->Withdraw(request, absl::CancelledError("the caller went away"));
  });
}

grpc::ServerUnaryReactor* WaitingCall::End(const absl::Status& status) {
  Finish(ToGrpc(status));
  return this;
}

int WaitingCall::Pending::Begin() {
  MutexLock lock(&mutex_);
  withdraw_ = nullptr;
  return ++requests_;
}

void WaitingCall::Pending::Set(int request, std::function<void()> withdraw) {
  {
    MutexLock lock(&mutex_);
    if (request != requests_) return;
    if (!is_cancelled_) return withdraw_.swap(withdraw);
  }
  withdraw();
}

void WaitingCall::Pending::Cancel() {
  std::function<void()> withdraw;
  {
    MutexLock lock(&mutex_);
    is_cancelled_ = true;
    withdraw_.swap(withdraw);
  }
  if (withdraw) withdraw();
}

}  // namespace orlop::server
