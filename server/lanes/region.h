// The one parser of regions: what part of a tensor a Push, a SetState or a Pull names. Pure; any
// thread.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/box.h"
#include "orlop/v1/data.pb.h"
#include "orlop/v1/types.pb.h"
#include "server/job/job_model.h"
#include "server/job/slots.h"
#include "server/runtime/wait.h"
#include "server/step/actions.h"
#include "server/step/participant.h"

namespace orlop::server {

struct Region {
  uint32_t tensor = 0;                      // index in the manifest
  Slot slot = Slot::kWeight;                // of RegionOf::kState
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;  // as the caller said it
  Box box;                                  // NormalBox
  // The shards it names, as places among the tensor's shards: [first, last].
  uint64_t first_shard = 0;
  uint64_t last_shard = 0;

  // The job's id of the first shard.
  int32_t shard_id(const JobModel& model) const {
    return model.FirstShard(tensor) + static_cast<int32_t>(first_shard);
  }
};

// Push sends gradients; SetState and Pull name slots of the state.
enum class RegionOf : uint8_t { kGradient, kState };

// Parses a region of a tensor of this job.
//   Status  NotFound (UNKNOWN_TENSOR); InvalidArgument: the tensor has no such shard, the box is
//           not inside it, or the slot is unknown or not one of `of`.
absl::StatusOr<Region> ParseRegion(const JobModel& model, const v1::Region& wire, RegionOf of);

// Checks that a region names exactly one shard, and that the server `self` owns it.
//   Status  InvalidArgument: the tensor has several shards and the region names none; NotFound
//           (NOT_OWNER): the detail names the owner.
absl::Status CheckOnePiece(const JobModel& model, const Region& region, int self,
                           const std::vector<std::string>& server_names);

// The attempt that a stream's key names.
step::AttemptKey KeyOf(const v1::StreamKey& key);
// The part of a caller's wait that a key ahead of this server is worth: the leader repeats an
// unanswered message every second.
Wait ForAnAttempt(const Wait& wait);

// Where a stream is, for the details of its errors.
struct StreamPlace {
  std::string job;
  std::string tensor;             // empty: no piece has begun
  std::optional<uint64_t> shard;  // place among the tensor's shards
};
// Adds the place and the job's position to an error (runtime/answers.h).
absl::Status Explain(const absl::Status& status, const StreamPlace& place,
                     const step::Position& position);

}  // namespace orlop::server
