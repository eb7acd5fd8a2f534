#include "server/tiers/use_order.h"

#include <chrono>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "base/mutex.h"

namespace orlop::server {

void UseOrder::Used(int32_t shard, int64_t version) {
  MutexLock lock(&mutex_);
  last_use_ = std::chrono::steady_clock::now();
  if (version > version_) {
    version_ = version;
    before_ = std::exchange(used_, {});
    seen_.clear();
  }
  if (version == version_ && seen_.insert(shard).second) used_.push_back(shard);
}

std::chrono::steady_clock::time_point UseOrder::last_use() const {
  MutexLock lock(&mutex_);
  return last_use_;
}

std::vector<int32_t> UseOrder::Next() const {
  MutexLock lock(&mutex_);
  std::vector<int32_t> order = used_;
  std::set<int32_t> seen(order.begin(), order.end());
  for (const auto* later : {&before_, &shards_})
    for (int32_t shard : *later)
      if (seen.insert(shard).second) order.push_back(shard);
  return order;
}

}  // namespace orlop::server
