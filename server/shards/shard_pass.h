// The pass: the first phase of a step of a tensor whose optimizer reads all of it before it changes
// any element (LAMB, Adafactor, Muon; kernels/tensor_pass.h). It reads the shards in order and
// changes nothing, so that it may be done again.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "server/job/slots.h"
#include "server/shards/shard.h"
#include "server/shards/shard_update.h"
#include "server/tiers/job_room.h"
#include "server/tiers/residency.h"

namespace orlop::server {

// A tensor, all of whose shards are here.
struct WholeTensorShards {
  const Tensor* tensor = nullptr;
  TensorOptimizer optimizer;
  std::vector<Shard*> shards;  // in order
};

// Memory for the passes of one step: factored tensors are measured side by side, matrices one after
// another. `optimizers`: one for each tensor.
uint64_t PassBytes(const OwnedShards& owned, const std::vector<TensorOptimizer>& optimizers);

// See ShardStore::RunPass. `room`: PassBytes of memory.
absl::StatusOr<std::shared_ptr<const PassResult>> RunPass(const WholeTensorShards& whole,
                                                          const ShardUpdate& update, JobRoom* room,
                                                          Residency* residency);

}  // namespace orlop::server
