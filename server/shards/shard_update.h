// What a committed decision does to a shard.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "kernels/optimizer.h"
#include "kernels/tensor_pass.h"
#include "server/memory/accountant.h"

namespace orlop::server {

// What the pass over a whole tensor found: the first phase of a step of LAMB, Adafactor or Muon
// (kernels/tensor_pass.h).
struct PassResult {
  BufferPtr memory;  // kernels::PassMemory, which the updates of the shards read; or null
  std::optional<kernels::TensorPass> pass;
};

struct ShardUpdate {
  enum class Kind : uint8_t { kApply, kSkip, kLoad };
  Kind kind = Kind::kApply;
  int64_t step = 0;        // the version it makes
  bool untouched = false;  // the tensor was absent from all contributors
  kernels::StepScalars scalars;
  kernels::RandomKey random;
  // If the optimizer takes a pass over the whole tensor first: what it found.
  std::shared_ptr<const PassResult> pass;
  // ShardStore::loads() when the update was made: a shard that a flush has replaced since is not
  // stepped. -1: any.
  int64_t loads = -1;
};

}  // namespace orlop::server
