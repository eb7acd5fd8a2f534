// Reasons of refusals. The code of a status determines the caller's next action, the reason tells
// programs why a machine refused, and the message tells people. The reason, and the shard that an
// error is about, are payloads of the status.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"

namespace orlop::step {

// The names and numbers of v1::ErrorDetail::Reason (proto/orlop/v1/types.proto), where each is
// explained. server/job/step_codec.cc checks that they agree.
enum class Reason : uint8_t {
  kUnspecified = 0,  // the code needs no reason
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

// Returns `status` with a reason. It must not be OK.
absl::Status Because(Reason reason, absl::Status status);
// Returns the reason of an error; kUnspecified if it has none.
Reason ReasonOf(const absl::Status& status);

// Returns the reason of a FailedPrecondition for a call that does not fit the step being made:
// kLoading if the job has committed nothing, else kWrongStep.
inline Reason UnfitStep(int64_t committed_step) {
  return committed_step < 0 ? Reason::kLoading : Reason::kWrongStep;
}

// Return the error for a call that names an epoch (FailedPrecondition), or a generation (Aborted),
// that is over.
absl::Status StaleEpoch(int64_t epoch, int64_t current);
absl::Status StaleGeneration(int64_t generation, int64_t current);

// A shard by the name of its tensor and its index among the shards of the tensor.
struct ShardName {
  std::string tensor;
  uint64_t index = 0;
};
// About returns `status`, which must not be OK, with the shard that the error is about. ShardOf
// returns that shard; absent if the status has none.
absl::Status About(const ShardName& shard, absl::Status status);
std::optional<ShardName> ShardOf(const absl::Status& status);

}  // namespace orlop::step
