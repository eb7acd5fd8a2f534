// This header decides which server owns which shard of a new job. The largest shard is placed
// first, on the server that has the least bytes ("longest processing time first"). The functions
// are pure and deterministic: the same job and servers give the same placement on every machine.
//   Source  R. L. Graham, Bounds on Multiprocessing Timing Anomalies, 1969: the fullest server
//           holds at most 4/3 of the optimum.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "server/job/job_model.h"

namespace orlop::server {

// A TensorLoad tells how many bytes the shards of one tensor take.
struct TensorLoad {
  uint64_t element_count = 0;
  double bytes_per_element = 0;  // of the stored slots and the staged gradient
  bool whole = false;            // one server owns all shards of the tensor
};

// A PlacedRun is a run of consecutive shards of one tensor that one server owns.
struct PlacedRun {
  uint32_t tensor = 0;       // index in `tensors`
  uint64_t first_shard = 0;  // index in the tensor
  uint64_t shard_count = 0;
  uint32_t server = 0;  // index in `servers`
  std::string reason;   // why this server was chosen, in a sentence for people

  friend bool operator==(const PlacedRun&, const PlacedRun&) = default;
};

// Places all shards. Returns runs in manifest order that cover every shard of every tensor once.
// `tensors` are in manifest order. A shard has `shard_elements` elements; the last shard of a
// tensor may have fewer. `servers` are names, sorted; at least one.
//   Order   Shards are placed by bytes, largest first; equal ones in manifest order. All shards of
//           a whole tensor are placed as one. Each is placed on the server with the least bytes;
//           among equals, on the first by name.
//   Cost    O(n log n) for n shards
std::vector<PlacedRun> PlaceShards(const std::vector<TensorLoad>& tensors, uint64_t shard_elements,
                                   const std::vector<std::string>& servers);

// Places the shards of a new job by PlaceShards, and adds the runs to its definition. The bytes of
// a parameter are those of 8-bit AdamW, the default, with its staged gradient; the optimizer is not
// configured yet. `server_names` are sorted; at least one.
//   Status  InvalidArgument: the definition would not fit into one message between servers (64 MiB)
absl::Status Place(const JobModel& model, const std::vector<std::string>& server_names,
                   v1::JobDefinition* definition);

}  // namespace orlop::server
