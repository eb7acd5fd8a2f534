// The one parser of regions: which part of which slot of a tensor a Push, a SetState or a Pull
// names.
//   Threads  pure functions and values: safe from any thread.
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

// A parsed v1::Region.
struct Region {
  uint32_t tensor = 0;                      // index in the manifest
  Slot slot = Slot::kWeight;                // for RegionOf::kState only
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;  // the caller's; UNSPECIFIED: the caller named none
  Box box;                                  // as NormalBox returns it
  // The first and the last shard that the region names, as places among the tensor's shards.
  uint64_t first_shard = 0;
  uint64_t last_shard = 0;

  // Returns the first shard's id, its place among all shards of the job.
  int32_t shard_id(const JobModel& model) const {
    return model.FirstShard(tensor) + static_cast<int32_t>(first_shard);
  }
};

// Push sends gradients; SetState and Pull name slots of the state.
enum class RegionOf : uint8_t { kGradient, kState };

// Parses a region of a tensor of this job.
//   Status  NotFound (UNKNOWN_TENSOR); InvalidArgument: the tensor has no such shard, the box is
//           not inside the tensor, or the slot is unknown or not allowed by `of`
absl::StatusOr<Region> ParseRegion(const JobModel& model, const v1::Region& wire, RegionOf of);

// Checks that a region names exactly one shard, and that the server `self` owns it.
//   Status  InvalidArgument: the tensor has several shards and the region names none; NotFound
//           (NOT_OWNER): the detail names the owner.
absl::Status CheckOnePiece(const JobModel& model, const Region& region, int self,
                           const std::vector<std::string>& server_names);

// Returns the attempt that a stream's key names.
step::AttemptKey KeyOf(const v1::StreamKey& key);
// Returns `wait`, cut to three seconds, for a call whose attempt is not open on this server yet.
// The leader repeats an unanswered message every second, so a longer wait would rarely help.
Wait ForAnAttempt(const Wait& wait);

// What a stream is working on, for the details of its errors.
struct StreamPlace {
  std::string job;
  std::string tensor;             // empty: no piece has begun
  std::optional<uint64_t> shard;  // place among the tensor's shards
};
// Adds the place and the job's position to an error (WithPosition, server/runtime/answers.h). OK
// stays OK.
absl::Status Explain(const absl::Status& status, const StreamPlace& place,
                     const step::Position& position);

}  // namespace orlop::server
