#include "server/services/arrivals.h"

#include <vector>

#include "gtest/gtest.h"

namespace orlop::server {
namespace {

constexpr char kJoin[] = "/orlop.v1.Job/Join", kHealth[] = "/grpc.health.v1.Health/Check";

TEST(Arrivals, RefusesWhatIsTooMuchUntilSomeHaveArrived) {
  Arrivals arrivals(3, 3);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(arrivals.Begin(kJoin, 7));
  EXPECT_FALSE(arrivals.Begin(kJoin, 7));
  EXPECT_FALSE(arrivals.Begin(kJoin, 7));
  arrivals.Arrived(kJoin, 7);
  EXPECT_FALSE(arrivals.Begin(kJoin, 7)) << "it is still there";
  arrivals.Ended(kJoin, 7, false);
  EXPECT_TRUE(arrivals.Begin(kJoin, 7));
  EXPECT_FALSE(arrivals.Begin(kJoin, 7));
}

TEST(Arrivals, LeavesSharesToOtherConnections) {
  Arrivals arrivals(4, 2);
  for (const int lane : {1, 2}) {
    EXPECT_TRUE(arrivals.Begin(kJoin, lane));
    EXPECT_TRUE(arrivals.Begin(kJoin, lane));
    EXPECT_FALSE(arrivals.Begin(kJoin, lane));
  }
  EXPECT_FALSE(arrivals.Begin(kJoin, 3)) << "there are four";
  arrivals.Arrived(kJoin, 1);
  arrivals.Ended(kJoin, 1, false);
  EXPECT_FALSE(arrivals.Begin(kJoin, 2));
  EXPECT_TRUE(arrivals.Begin(kJoin, 3));
}

TEST(Arrivals, CutsOffWhoGoesOn) {
  Arrivals arrivals(16, 16);
  std::vector<int> cut;
  arrivals.SetOnFlood([&](int lane) { cut.push_back(lane); });
  for (int i = 0; i < 18; ++i) arrivals.Begin(kJoin, 5);
  EXPECT_TRUE(cut.empty()) << "two were too many";
  arrivals.Tick();
  for (int i = 0; i < 40; ++i) arrivals.Begin(kJoin, 5);
  EXPECT_EQ(cut, std::vector<int>{5});
  arrivals.Tick();
  for (int i = 0; i < 40; ++i) arrivals.Begin(kJoin, 5);
  EXPECT_EQ(cut.size(), 2u);
}

TEST(Arrivals, ForgetsCallsThatNeverArrive) {
  Arrivals arrivals(3, 3);
  EXPECT_TRUE(arrivals.Begin(kJoin, 7));  // never arrives
  EXPECT_TRUE(arrivals.Begin(kJoin, 7));  // nor does this one
  for (int tick = 0; tick < 3; ++tick) {
    EXPECT_TRUE(arrivals.Begin(kJoin, 7)) << "others come and go";
    EXPECT_FALSE(arrivals.Begin(kJoin, 7));
    arrivals.Arrived(kJoin, 7);
    arrivals.Ended(kJoin, 7, false);
    arrivals.Tick();
  }
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(arrivals.Begin(kJoin, 7)) << i;
  EXPECT_FALSE(arrivals.Begin(kJoin, 7));
  // A call that comes later than that leaves no more room than there was.
  for (int i = 0; i < 6; ++i) {
    arrivals.Arrived(kJoin, 7);
    arrivals.Ended(kJoin, 7, false);
  }
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(arrivals.Begin(kJoin, 7)) << i;
  EXPECT_FALSE(arrivals.Begin(kJoin, 7));
}

TEST(Arrivals, KeepsCallsThatWaitAtTheGate) {
  Arrivals arrivals(1, 1);
  EXPECT_TRUE(arrivals.Begin(kJoin, 7));
  arrivals.Arrived(kJoin, 7);
  for (int tick = 0; tick < 5; ++tick) arrivals.Tick();
  EXPECT_FALSE(arrivals.Begin(kJoin, 7));
}

TEST(Arrivals, GivesOtherServicesAShareOfEachTick) {
  Arrivals arrivals(1, 1);
  int begun = 0;
  for (int i = 0; i < 10'000; ++i) begun += arrivals.Begin(kHealth, 7);
  EXPECT_GT(begun, 10);
  EXPECT_LT(begun, 1000);
  EXPECT_TRUE(arrivals.Begin(kJoin, 7)) << "its own share is another one";
  arrivals.Tick();
  EXPECT_TRUE(arrivals.Begin(kHealth, 7));
}

// gRPC frees a cancelled call later than it ends.
TEST(Arrivals, CancelledCallsCountUntilTheSecondTick) {
  Arrivals arrivals(100, 4);
  for (int i = 0; i < 4; ++i) {
    EXPECT_TRUE(arrivals.Begin(kJoin, 1));
    arrivals.Arrived(kJoin, 1);
    arrivals.Ended(kJoin, 1, true);
  }
  EXPECT_FALSE(arrivals.Begin(kJoin, 1));
  EXPECT_TRUE(arrivals.Begin(kJoin, 2)) << "another lane";
  arrivals.Tick();
  EXPECT_FALSE(arrivals.Begin(kJoin, 1));
  arrivals.Tick();
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(arrivals.Begin(kJoin, 1));
  EXPECT_FALSE(arrivals.Begin(kJoin, 1));
}

}  // namespace
}  // namespace orlop::server
