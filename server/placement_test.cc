#include "server/placement.h"

#include <algorithm>
#include <map>
#include <random>

#include "gtest/gtest.h"
#include "proto/box.h"

namespace orlop::server {
namespace {

std::vector<TensorLoad> RandomTensors(std::mt19937_64& random) {
  std::vector<TensorLoad> tensors(1 + random() % 40);
  for (TensorLoad& tensor : tensors)
    tensor = {1 + random() % 20000, 2.0 + static_cast<double>(random() % 3) * 4.03};
  return tensors;
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
