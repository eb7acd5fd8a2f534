// The result of staging a shard, for gradients and for LOADs alike.
#pragma once

#include <cstdint>

#include "base/checksum.h"

namespace orlop::server {

// What the step machine learns of a staged shard, as step::ShardStaged.
struct StagedShard {
  // Identifies what is staged: the digest of the gradient, or of the planes. Zero if absent.
  Digest128 digest;
  // The sum of the squares of a gradient's finite elements, and the number of the others. Zero for
  // a LOAD.
  double sum_squares = 0;
  uint64_t nonfinite_count = 0;
  // Nothing was sent.
  bool absent = false;
};

}  // namespace orlop::server
