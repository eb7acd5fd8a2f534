// The pass: the first phase of a step whose optimizer reads a whole tensor before it changes any
// element (LAMB, Adafactor, Muon; kernels/tensor_pass.h). The pass reads the shards of the tensor
// in order and changes nothing, so that it may be repeated.
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

// A tensor whose shards are all on this server.
struct WholeTensorShards {
  const Tensor* tensor = nullptr;
  TensorOptimizer optimizer;
  // All shards of the tensor, in ascending order.
  std::vector<Shard*> shards;
};

// Returns the memory in bytes for the passes of one step. Tensors of Scope::kMatrix are measured
// one after another and share the memory of the largest; every other tensor has memory of its own.
// `optimizers` has one entry for each tensor.
uint64_t PassBytes(const OwnedShards& owned, const std::vector<TensorOptimizer>& optimizers);

// Implements ShardStore::RunPass. `room` has PassBytes of memory.
absl::StatusOr<std::shared_ptr<const PassResult>> RunPass(const WholeTensorShards& whole,
                                                          const ShardUpdate& update, JobRoom* room,
                                                          Residency* residency);

}  // namespace orlop::server
