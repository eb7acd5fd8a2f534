#include "server/memory/read_room.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "gtest/gtest.h"

namespace orlop::server {
namespace {

constexpr uint64_t kMiB = 1 << 20;

TEST(ReadRoom, IsAnEighthOfTheBudget) {
  EXPECT_EQ(ReadRoom::BytesFor(1024 * kMiB), 128 * kMiB);
  EXPECT_EQ(ReadRoom::BytesFor(kMiB), 16 * kMiB) << "two pulls of the largest chunks begin";
}

TEST(ReadRoom, HasItsFirstHalfForThoseWhoBegin) {
  ReadRoom room(8 * kMiB);
  ReadRoom::Held first(&room), second(&room), third(&room);
  EXPECT_TRUE(first.Grow(2 * kMiB).ok());
  EXPECT_TRUE(second.Grow(2 * kMiB).ok());
  EXPECT_FALSE(first.is_wanted());
  EXPECT_TRUE(absl::IsResourceExhausted(third.Grow(1)));
  EXPECT_TRUE(first.is_wanted());
  EXPECT_FALSE(third.is_wanted()) << "it has nothing";
  EXPECT_TRUE(second.Grow(1).ok()) << "it has more";
  EXPECT_TRUE(second.Grow(6 * kMiB).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(first.Grow(2 * kMiB + 1)));
}

TEST(ReadRoom, GivesAnyNumberToWhoeverIsAlone) {
  ReadRoom room(8 * kMiB);
  auto large = std::make_unique<ReadRoom::Held>(&room);
  ReadRoom::Held other(&room);
  EXPECT_TRUE(large->Grow(100 * kMiB).ok());
  EXPECT_TRUE(large->Grow(200 * kMiB).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(other.Grow(1)));
  large = nullptr;
  EXPECT_TRUE(other.Grow(4 * kMiB).ok());
}

TEST(ReadRoom, LetsALargePullInBesideSmallOnes) {
  ReadRoom room(16 * kMiB);
  ReadRoom::Held small(&room), large(&room), next(&room);
  EXPECT_TRUE(small.Grow(3 * kMiB).ok());
  EXPECT_TRUE(large.Grow(100 * kMiB).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(next.Grow(1)));
}

TEST(ReadRoom, CountsForManyThreads) {
  ReadRoom room(64 * kMiB);
  std::atomic<int> in_room = 0, refused = 0;
  {
    std::vector<std::jthread> threads;
    threads.reserve(4);
    for (int i = 0; i < 4; ++i)
      threads.emplace_back([&] {
        for (int round = 0; round < 2000; ++round) {
          ReadRoom::Held held(&room);
          if (!held.Grow(16 * kMiB).ok()) {
            ++refused;
            continue;
          }
          EXPECT_LE(++in_room, 2);
          --in_room;
        }
      });
  }
  ReadRoom::Held all(&room), other(&room);
  EXPECT_TRUE(all.Grow(16 * kMiB).ok()) << "nothing is left behind";
  EXPECT_TRUE(other.Grow(16 * kMiB).ok());
}

}  // namespace
}  // namespace orlop::server
