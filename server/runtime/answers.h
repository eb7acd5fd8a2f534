// What every handler does around its work: deadline and cancellation of the caller, and the
// statuses of an answer.
#pragma once

#include <grpcpp/server_context.h>

#include "proto/status.h"
#include "server/runtime/job_runtime.h"

namespace orlop::server {

// The caller's deadline, at most ten minutes from now.
inline Wait WaitOf(grpc::ServerContext* context) {
  const auto left = context->deadline() - std::chrono::system_clock::now();
  const auto most = std::chrono::minutes(10);
  return {std::chrono::steady_clock::now() + std::min<std::chrono::nanoseconds>(left, most),
          [context] { return context->IsCancelled(); }};
}

// InvalidArgument: a loss scale that is neither 0 (which means 1) nor within proto/limits.h.
absl::Status CheckLossScale(double loss_scale);

// InvalidArgument: a control message over kMaxControlMessageBytes. With several servers the
// transport lets more through, for the sake of theirs.
absl::Status CheckControlSize(const google::protobuf::Message& request);

// The one map of errors: completes an error of the machines or of the shell with its reason and
// with the job's position, so that callers branch on fields. Where the error names no reason, its
// code decides. STALE_GENERATION is FailedPrecondition on the wire, whichever code a machine gave
// it.
absl::Status WithPosition(absl::Status status, const step::Position& position,
                          const std::string& job);

}  // namespace orlop::server
