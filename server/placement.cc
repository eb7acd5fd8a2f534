#include "server/placement.h"

#include <algorithm>
#include <functional>
#include <queue>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "proto/box.h"

namespace orlop::server {
namespace {

struct Shard {
  uint32_t tensor;
  uint64_t shard;
  double bytes;
};

std::vector<Shard> ShardsOf(const std::vector<TensorLoad>& tensors, uint64_t shard_elements) {
  std::vector<Shard> shards;
  for (uint32_t t = 0; t < tensors.size(); ++t) {
    const uint64_t count = ShardCount(tensors[t].element_count, shard_elements);
    for (uint64_t s = 0; s < count; ++s) {
      const Range range = ShardRange(s, tensors[t].element_count, shard_elements);
      shards.push_back({t, s, static_cast<double>(range.count()) * tensors[t].bytes_per_element});
    }
  }
  return shards;
}

std::string Reason(const std::string& server, double share, size_t server_count) {
  if (server_count == 1) return "the only server";
  return absl::StrFormat(
      "%s had the least bytes when placed, largest shard first; it holds %.1f%% of the job", server,
      share * 100);
}

}  // namespace

std::vector<PlacedRun> PlaceShards(const std::vector<TensorLoad>& tensors, uint64_t shard_elements,
                                   const std::vector<std::string>& servers) {
  const std::vector<Shard> shards = ShardsOf(tensors, shard_elements);
  std::vector<size_t> order(shards.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return shards[a].bytes > shards[b].bytes; });

  using Load = std::pair<double, uint32_t>;  // bytes so far, server
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> least;
  for (uint32_t i = 0; i < servers.size(); ++i) least.push({0.0, i});
  std::vector<uint32_t> owner(shards.size());
  std::vector<double> held(servers.size(), 0.0);
  double total = 0;
  for (size_t i : order) {
    auto [bytes, server] = least.top();
    least.pop();
    owner[i] = server;
    held[server] = bytes + shards[i].bytes;
    total += shards[i].bytes;
    least.push({held[server], server});
  }

  std::vector<PlacedRun> runs;
  for (size_t i = 0; i < shards.size(); ++i) {
    if (!runs.empty() && runs.back().tensor == shards[i].tensor && runs.back().server == owner[i]) {
      ++runs.back().shard_count;
      continue;
    }
    const double share = total > 0 ? held[owner[i]] / total : 0;
    runs.push_back({shards[i].tensor, shards[i].shard, 1, owner[i],
                    Reason(servers[owner[i]], share, servers.size())});
  }
  return runs;
}

}  // namespace orlop::server
