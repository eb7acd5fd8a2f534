#include "server/durability/flush_schedule.h"

#include "gtest/gtest.h"

namespace orlop::server {
namespace {

TEST(FlushSchedule, WaitsBetweenFlushesAndForAStep) {
  FlushSchedule schedule(1000, 500);
  EXPECT_FALSE(schedule.IsDue(1499, 3, -1));
  EXPECT_TRUE(schedule.IsDue(1500, 3, -1));
  EXPECT_FALSE(schedule.IsDue(1500, -1, -1)) << "nothing is committed";
  EXPECT_FALSE(schedule.IsDue(1500, 3, 3)) << "the step is on disk";
  schedule.Ended(1500, 1510);
  EXPECT_FALSE(schedule.IsDue(2509, 4, 3));
  EXPECT_TRUE(schedule.IsDue(2510, 4, 3));
}

TEST(FlushSchedule, TakesAtMostAFiftiethOfTheTime) {
  FlushSchedule schedule(1000, 0);
  schedule.Ended(1000, 1100);  // 100 ms of each 5,000
  EXPECT_FALSE(schedule.IsDue(5999, 2, 1));
  EXPECT_TRUE(schedule.IsDue(6000, 2, 1));
}

TEST(FlushSchedule, ZeroIsNever) { EXPECT_FALSE(FlushSchedule(0, 0).IsDue(1 << 30, 2, 1)); }

}  // namespace
}  // namespace orlop::server
