#include "server/cluster/placement.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "base/box.h"
#include "gtest/gtest.h"

namespace orlop::server {
namespace {

std::vector<TensorLoad> RandomTensors(std::mt19937_64& random) {
  std::vector<TensorLoad> tensors(1 + random() % 40);
  for (TensorLoad& tensor : tensors)
    tensor = {1 + random() % 20000, 2.0 + static_cast<double>(random() % 3) * 4.03};
  return tensors;
}

std::vector<std::string> ServerNames(size_t count) {
  std::vector<std::string> names;
  names.reserve(count);
  for (size_t i = 0; i < count; ++i) names.push_back(std::string(1, static_cast<char>('a' + i)));
  return names;
}

// Returns the server of each shard of each tensor, by brute force: again and again, the largest
// shard or whole tensor that has no server yet is placed on the server that has the least bytes.
std::vector<std::vector<uint32_t>> OwnersByBruteForce(const std::vector<TensorLoad>& tensors,
                                                      uint64_t shard_elements, size_t servers) {
  std::vector<std::vector<uint32_t>> owners;
  owners.reserve(tensors.size());
  for (const TensorLoad& tensor : tensors)
    owners.emplace_back(ShardCount(tensor.element_count, shard_elements), UINT32_MAX);
  std::vector<double> held(servers, 0.0);
  const auto bytes = [&](size_t t, size_t s) {
    const uint64_t all = tensors[t].element_count;
    const uint64_t elements =
        tensors[t].whole ? all : std::min(shard_elements, all - s * shard_elements);
    return static_cast<double>(elements) * tensors[t].bytes_per_element;
  };
  for (;;) {
    size_t tensor = tensors.size(), shard = 0;
    for (size_t t = 0; t < tensors.size(); ++t) {
      for (size_t s = 0; s < owners[t].size(); ++s) {
        if (owners[t][s] != UINT32_MAX) continue;
        if (tensor < tensors.size() && bytes(t, s) <= bytes(tensor, shard)) continue;
        tensor = t;
        shard = s;
      }
    }
    if (tensor == tensors.size()) return owners;
    const auto least = std::min_element(held.begin(), held.end());
    *least += bytes(tensor, shard);
    const auto server = static_cast<uint32_t>(least - held.begin());
    if (tensors[tensor].whole) {
      std::fill(owners[tensor].begin(), owners[tensor].end(), server);
    } else {
      owners[tensor][shard] = server;
    }
  }
}

std::vector<std::vector<uint32_t>> OwnersOf(const std::vector<PlacedRun>& runs, size_t tensors) {
  std::vector<std::vector<uint32_t>> owners(tensors);
  for (const PlacedRun& run : runs)
    owners[run.tensor].insert(owners[run.tensor].end(), run.shard_count, run.server);
  return owners;
}

TEST(Placement, CoversEveryShardOnceInManifestOrder) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 50; ++round) {
    const std::vector<TensorLoad> tensors = RandomTensors(random);
    const std::vector<std::string> servers = {"a", "b", "c"};
    std::vector<uint64_t> next(tensors.size(), 0);
    uint32_t tensor = 0;
    for (const PlacedRun& run : PlaceShards(tensors, 1024, servers)) {
      ASSERT_GE(run.tensor, tensor);
      tensor = run.tensor;
      ASSERT_EQ(run.first_shard, next[tensor]);
      next[tensor] += run.shard_count;
      EXPECT_FALSE(run.reason.empty());
    }
    for (size_t i = 0; i < tensors.size(); ++i)
      EXPECT_EQ(next[i], ShardCount(tensors[i].element_count, 1024)) << round;
  }
}

TEST(Placement, FullestServerHoldsAtMostFourThirdsOfTheOptimum) {
  std::mt19937_64 random(2);
  for (int round = 0; round < 50; ++round) {
    const std::vector<TensorLoad> tensors = RandomTensors(random);
    std::map<uint32_t, double> held;
    double total = 0, largest = 0;
    for (const PlacedRun& run : PlaceShards(tensors, 1024, {"a", "b", "c", "d"})) {
      for (uint64_t s = run.first_shard; s < run.first_shard + run.shard_count; ++s) {
        const double bytes =
            static_cast<double>(ShardRange(s, tensors[run.tensor].element_count, 1024).count()) *
            tensors[run.tensor].bytes_per_element;
        held[run.server] += bytes;
        total += bytes;
        largest = std::max(largest, bytes);
      }
    }
    for (const auto& [server, bytes] : held)
      EXPECT_LE(bytes, 4.0 / 3.0 * std::max(total / 4, largest) + largest / 3) << round;
  }
}

TEST(Placement, IsThatOfBruteForceAndNeverSplitsAWholeTensor) {
  std::mt19937_64 random(4);
  for (int round = 0; round < 120; ++round) {
    std::vector<TensorLoad> tensors = RandomTensors(random);
    const uint64_t whole_of_four = random() % 5;  // so many of four tensors are whole
    for (TensorLoad& tensor : tensors) tensor.whole = random() % 4 < whole_of_four;
    const uint64_t shard_elements = uint64_t{256} << random() % 6;
    const std::vector<std::string> servers = ServerNames(1 + random() % 5);
    const std::vector<PlacedRun> runs = PlaceShards(tensors, shard_elements, servers);
    EXPECT_EQ(OwnersOf(runs, tensors.size()),
              OwnersByBruteForce(tensors, shard_elements, servers.size()))
        << "round " << round;
    std::map<uint32_t, int> runs_of;
    for (const PlacedRun& run : runs) {
      ++runs_of[run.tensor];
      EXPECT_EQ(run.reason.starts_with("whole tensor, "), tensors[run.tensor].whole) << run.reason;
    }
    for (uint32_t t = 0; t < tensors.size(); ++t) {
      if (tensors[t].whole) EXPECT_EQ(runs_of[t], 1) << "round " << round << " tensor " << t;
    }
  }
}

TEST(Placement, SameJobGivesSamePlacement) {
  std::mt19937_64 random(3);
  const std::vector<TensorLoad> tensors = RandomTensors(random);
  EXPECT_EQ(PlaceShards(tensors, 512, {"a", "b"}), PlaceShards(tensors, 512, {"a", "b"}));
  for (const PlacedRun& run : PlaceShards(tensors, 512, {"only"})) {
    EXPECT_EQ(run.server, 0u);
    EXPECT_EQ(run.reason, "the only server");
  }
}

}  // namespace
}  // namespace orlop::server
