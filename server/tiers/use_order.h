// A UseOrder predicts the order in which the shards of a job are used next. It records the pulls of
// weights: a training job pulls its model in the same order in every step.
//   Threads  All methods are safe from any thread. Nothing waits.
#pragma once

#include <chrono>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "base/mutex.h"

namespace orlop::server {

class UseOrder {
 public:
  // `shards`: all ids, in manifest order.
  explicit UseOrder(std::vector<int32_t> shards) : shards_(std::move(shards)) {}

  // Records that a pull has opened the weight of a shard at `version`. A version older than the
  // newest recorded one is ignored.
  void Used(int32_t shard, int64_t version);

  // Returns all shards by predicted next use. The shards used at the newest version are first, then
  // those used at the version before it, then the others in manifest order.
  std::vector<int32_t> Next() const;
  // Returns when the last pull was recorded; before the first, when the object was made.
  std::chrono::steady_clock::time_point last_use() const;

 private:
  const std::vector<int32_t> shards_;
  mutable Mutex mutex_;
  std::chrono::steady_clock::time_point last_use_ GUARDED_BY(mutex_) =
      std::chrono::steady_clock::now();
  int64_t version_ GUARDED_BY(mutex_) = -1;         // the newest recorded version
  std::vector<int32_t> used_ GUARDED_BY(mutex_);    // the shards used at it, by first use
  std::set<int32_t> seen_ GUARDED_BY(mutex_);       // the shards of `used_`
  std::vector<int32_t> before_ GUARDED_BY(mutex_);  // `used_` of the version recorded before
};

}  // namespace orlop::server
