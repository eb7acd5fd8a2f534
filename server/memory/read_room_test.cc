#include "server/memory/read_room.h"

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "gtest/gtest.h"

namespace orlop::server {
namespace {

constexpr uint64_t kMiB = 1 << 20;

TEST(ReadRoom, IsAnEighthOfTheBudget) {
  EXPECT_EQ(ReadRoom::BytesFor(1024 * kMiB), 128 * kMiB);
  EXPECT_EQ(ReadRoom::BytesFor(kMiB), 8 * kMiB) << "two chunks of the largest size";
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

}  // namespace
}  // namespace orlop::server
