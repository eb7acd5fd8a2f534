#include "server/lanes/stall_watch.h"

#include <chrono>

#include "gtest/gtest.h"
#include "proto/limits.h"

namespace orlop::server {
namespace {

TEST(StallWatch, CancelsTheWritesThatHaveStalledAndNoOther) {
  StallWatch watch;
  const auto begin = StallWatch::Clock::time_point(std::chrono::hours(1));
  const auto limit = std::chrono::milliseconds(kMaxStallMs);
  int first = 0, second = 0, done = 0;
  const StallWatch::Write write(
      &watch, [&] { ++first; }, begin);
  {
    const StallWatch::Write over(
        &watch, [&] { ++done; }, begin);
  }
  const StallWatch::Write later(
      &watch, [&] { ++second; }, begin + std::chrono::seconds(1));
  watch.Tick(begin + limit - std::chrono::milliseconds(1));
  EXPECT_EQ(first, 0);
  watch.Tick(begin + limit);
  EXPECT_EQ(first, 1);
  EXPECT_EQ(second, 0);
  EXPECT_EQ(done, 0);
}

}  // namespace
}  // namespace orlop::server
