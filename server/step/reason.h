// Why a machine refused something. The code of a status says what the caller does next, its reason
// says why, and its text is for people. Both travel in the status, as a payload.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"

namespace orlop::step {

// The names and numbers of v1::ErrorDetail::Reason (proto/orlop/v1/types.proto), where each is
// explained. server/job/step_codec.cc checks that they agree.
enum class Reason : uint8_t {
  kUnspecified = 0,  // the code says it all
  kBadRequest = 1,
  kUnknownJob = 2,
  kUnknownTensor = 3,
  kNotOwner = 4,
  kNotLeader = 5,
  kStaleEpoch = 6,
  kStaleGeneration = 7,
  kStaleAttempt = 8,
  kWrongStep = 9,
  kLoading = 10,
  kConflict = 11,
  kVersionGone = 12,
  kChecksum = 13,
  kBudget = 14,
  kRollbackOffered = 15,
  kLost = 16,
  kHyperParameters = 17,
  kDecided = 18,
  kStopping = 19,
};

// The error with a reason. `status` must not be OK.
absl::Status Because(Reason reason, absl::Status status);
// The reason of an error; kUnspecified if it has none.
Reason ReasonOf(const absl::Status& status);

// The reason of a FailedPrecondition for a call that does not fit the step being made: a job that
// has committed nothing is LOADING, any other is at another step.
inline Reason UnfitStep(int64_t committed_step) {
  return committed_step < 0 ? Reason::kLoading : Reason::kWrongStep;
}

// The call speaks of an epoch, or a generation, that is over.
absl::Status StaleEpoch(int64_t epoch, int64_t current);
absl::Status StaleGeneration(int64_t generation, int64_t current);

// Which shard an error is about: the tensor's name, and the shard's place among its tensor's
// shards.
struct ShardName {
  std::string tensor;
  uint64_t index = 0;
};
absl::Status About(const ShardName& shard, absl::Status status);
std::optional<ShardName> ShardOf(const absl::Status& status);

}  // namespace orlop::step
