// Walks the elements of a box within a shard in the order of a piece, in several steps.
#pragma once

#include <algorithm>
#include <cstdint>

#include "absl/status/status.h"
#include "base/box.h"
#include "server/shards/shard_info.h"

namespace orlop::server {

class RunCursor {
 public:
  RunCursor(const ShardInfo& shard, const Box& box)
      : begin_(shard.range().begin),
        runs_(Simplified(box, shard.tensor->shape), shard.tensor->shape, shard.range()) {}

  // Advances over the next `element_count` elements and calls visit(local, count, first) for each
  // run of them: the elements [local, local + count) of the shard are the elements [first, first +
  // count) of these `element_count`. Ends at the first error of `visit`.
  //   Status  Internal (the box has fewer elements), or that of `visit`
  template <typename Visit>
  absl::Status Advance(uint64_t element_count, Visit visit) {
    for (uint64_t done = 0; done < element_count;) {
      if (used_ == run_.count) {
        used_ = 0;
        if (!runs_.Next(&run_)) return absl::InternalError("piece is longer than its box");
      }
      const uint64_t take = std::min<uint64_t>(element_count - done, run_.count - used_);
      absl::Status status = visit(run_.tensor_begin + used_ - begin_, take, done);
      if (!status.ok()) return status;
      used_ += take;
      done += take;
    }
    return absl::OkStatus();
  }

 private:
  // First element of the shard in the flattened tensor.
  const uint64_t begin_;
  RunIterator runs_;
  // The current run, of which `used_` elements have been visited.
  Run run_;
  uint64_t used_ = 0;
};

}  // namespace orlop::server
