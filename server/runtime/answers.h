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

// FailedPrecondition (STALE_EPOCH, STALE_GENERATION) if the caller speaks of an epoch or generation
// that is over; 0: not checked.
absl::Status CheckNotStale(uint64_t epoch, uint64_t generation, const step::Position& position);

// The reasons that a step's own numbers give a FailedPrecondition of the machine; other errors, and
// those with a reason, stay as they are.
//   CommitStep  STALE_GENERATION: one that has not formed
//   AbortStep   STALE_GENERATION; DECIDED: the last committed step, or the open attempt, which can
//               only have been refused for that; WRONG_STEP: any other step or attempt
absl::Status ExplainCommit(absl::Status status, const v1::CommitStepRequest& request,
                           const step::Position& position);
absl::Status ExplainAbort(absl::Status status, const v1::AbortStepRequest& request,
                          const step::Position& position);

// InvalidArgument: a loss scale that is neither 0 (which means 1) nor within proto/limits.h.
absl::Status CheckLossScale(double loss_scale);

// InvalidArgument: a control message over kMaxControlMessageBytes. With several servers the
// transport lets more through, for the sake of theirs.
absl::Status CheckControlSize(const google::protobuf::Message& request);

// Adds where the job stands and a reason to the machine's error, so that callers branch on fields.
absl::Status WithPosition(absl::Status status, const step::Position& position,
                          const std::string& job);

}  // namespace orlop::server
