#include "base/mutex.h"

#include <gtest/gtest.h>
#include <stdlib.h>

namespace orlop {
namespace {

void TakeInBothOrders() {
  Mutex one, other;
  for (const bool turned : {false, true}) {
    const MutexLock outer(turned ? &other : &one);
    const MutexLock inner(turned ? &one : &other);
  }
}

// The thread sanitizer must report the order with the options that all tests have
// (CMakePresets.json).
TEST(MutexDeathTest, WrongOrderIsReported) {
#ifdef ORLOP_THREAD_SANITIZER
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT((TakeInBothOrders(), exit(0)), testing::ExitedWithCode(66), "lock-order-inversion");
#else
  TakeInBothOrders();
  GTEST_SKIP() << "only the thread sanitizer looks at the order of locks";
#endif
}

}  // namespace
}  // namespace orlop
