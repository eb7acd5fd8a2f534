// What staging a shard found, for gradients and for LOADs alike.
#pragma once

#include <cstdint>

#include "base/checksum.h"

namespace orlop::server {

// step::ShardStaged without the step machine's words.
struct StagedShard {
  Digest128 digest;  // zero if absent
  double sum_squares = 0;
  uint64_t nonfinite_count = 0;
  bool absent = false;  // nothing was sent
};

}  // namespace orlop::server
