// The order in which the shards of a job are used, learned from the pulls of their weights: a
// training job walks its model in the same order in every step. Pure but for its lock; any thread.
#pragma once

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

  // The weight of a shard was opened at this version. Uses of older versions than the newest one
  // count nothing.
  void Used(int32_t shard, int64_t version);

  // All shards in order of their next use: as used at the newest version, then as at the version
  // used before it, then in manifest order.
  std::vector<int32_t> Next() const;

 private:
  const std::vector<int32_t> shards_;
  mutable Mutex mutex_;
  int64_t version_ GUARDED_BY(mutex_) = -1;         // the newest
  std::vector<int32_t> used_ GUARDED_BY(mutex_);    // first uses at it, in order
  std::set<int32_t> seen_ GUARDED_BY(mutex_);       // the same
  std::vector<int32_t> before_ GUARDED_BY(mutex_);  // `used_` of the version before
};

}  // namespace orlop::server
