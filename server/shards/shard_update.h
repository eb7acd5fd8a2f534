// What a committed decision (ARCHITECTURE.md, "Words") does to one shard: the argument of
// ShardStore::Apply. Plain values. All shards of one tensor get the same one.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "kernels/optimizer.h"
#include "kernels/tensor_pass.h"
#include "server/memory/accountant.h"

namespace orlop::server {

// The result of the pass over a whole tensor: the first phase of a step of LAMB, Adafactor or Muon
// (kernels/tensor_pass.h). ShardStore::RunPass makes it; the updates of the tensor's shards read it
// and share it.
struct PassResult {
  BufferPtr memory;  // the arrays that `pass` points into; null if PassMemory::Bytes is 0
  std::optional<kernels::TensorPass> pass;  // always set in a result of RunPass
};

struct ShardUpdate {
  // kApply runs the optimizer on the staged gradient. kLoad installs the staged planes. kSkip
  // changes only the version.
  enum class Kind : uint8_t { kApply, kSkip, kLoad };
  Kind kind = Kind::kApply;
  int64_t step = 0;  // the version that the update makes
  // kApply: no contributor had a gradient for the tensor, or no optimizer trains it. Then only the
  // version changes; scalars, random and pass are not read.
  bool untouched = false;
  kernels::StepScalars scalars;  // kApply: from the decision
  kernels::RandomKey random;     // kApply: for stochastic rounding
  // kApply, if the optimizer takes a pass over the whole tensor first: its result; else null.
  std::shared_ptr<const PassResult> pass;
  // ShardStore::loads() when the update was made. If a flush has been loaded since, Apply returns
  // Aborted. -1: Apply does not check this.
  int64_t loads = -1;
};

}  // namespace orlop::server
