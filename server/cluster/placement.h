// Where the shards of a new job go: longest processing time first, by bytes. Pure and
// deterministic: the same job and servers give the same placement on any machine.
//   Source  R. L. Graham, Bounds on Multiprocessing Timing Anomalies, 1969: the fullest server
//   holds at most 4/3 of the optimum.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "server/job/job_model.h"

namespace orlop::server {

// Bytes that one tensor's shards take; all full shards of a tensor weigh the same.
struct TensorLoad {
  uint64_t element_count = 0;
  double bytes_per_element = 0;  // at rest and in flight
  bool whole = false;            // all its shards go to one server
};

// Consecutive shards of one tensor on one server.
struct PlacedRun {
  uint32_t tensor = 0;
  uint64_t first_shard = 0;
  uint64_t shard_count = 0;
  uint32_t server = 0;
  std::string reason;  // in words

  friend bool operator==(const PlacedRun&, const PlacedRun&) = default;
};

// Runs in manifest order that cover every shard of every tensor once. `servers` are names, sorted;
// at least one.
//   Order   shards (of a whole tensor: all of them as one) by bytes, largest first, equal ones in
//           manifest order; each goes to the least loaded server, the first by name among equals.
//   Cost    O(shards log shards).
std::vector<PlacedRun> PlaceShards(const std::vector<TensorLoad>& tensors, uint64_t shard_elements,
                                   const std::vector<std::string>& servers);

// Places the shards of a new job, balanced by the bytes of the default 8-bit state at rest and in
// flight, and adds the runs to its definition. `server_names` are sorted.
//   Status  InvalidArgument: the definition would not fit into one message between servers.
absl::Status Place(const JobModel& model, const std::vector<std::string>& server_names,
                   v1::JobDefinition* definition);

}  // namespace orlop::server
