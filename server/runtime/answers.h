// Helpers of every gRPC handler: the caller's deadline, checks of requests, and the details of
// errors.
#pragma once

#include <grpcpp/server_context.h>

#include "proto/status.h"
#include "server/runtime/job_runtime.h"

namespace orlop::server {

// Returns the caller's deadline, but at most ten minutes from now.
inline std::chrono::steady_clock::time_point DeadlineOf(const grpc::ServerContextBase& context) {
  const auto left = context.deadline() - std::chrono::system_clock::now();
  const auto most = std::chrono::minutes(10);
  return std::chrono::steady_clock::now() + std::min<std::chrono::nanoseconds>(left, most);
}
// Returns the same, and the caller's cancellation, for a call that waits in its thread. `context`
// must outlive the result.
inline Wait WaitOf(grpc::ServerContext* context) {
  return {DeadlineOf(*context), [context] { return context->IsCancelled(); }};
}

// Checks a loss scale of the wire, where 0 means 1.
//   Status  InvalidArgument: it is neither 0 nor from kMinLossScale to kMaxLossScale
absl::Status CheckLossScale(double loss_scale);

// Turns an error of a step machine or of JobRuntime into the one that is sent: it adds to the
// ErrorDetail the job and its position, so that callers branch on fields, and a reason that follows
// from the code if the error has none. An error with reason STALE_GENERATION becomes
// FailedPrecondition. OK stays OK.
absl::Status WithPosition(absl::Status status, const step::Position& position,
                          const std::string& job);

}  // namespace orlop::server
