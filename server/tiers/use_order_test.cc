#include "server/tiers/use_order.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>

namespace orlop::server {
namespace {

using testing::ElementsAre;

TEST(UseOrder, IsThatOfTheNewestVersionThenTheOneBefore) {
  UseOrder order({0, 1, 2, 3, 4});
  EXPECT_THAT(order.Next(), ElementsAre(0, 1, 2, 3, 4));
  for (int32_t shard : {3, 1, 4, 1}) order.Used(shard, 7);
  EXPECT_THAT(order.Next(), ElementsAre(3, 1, 4, 0, 2));
  order.Used(2, 8);
  order.Used(0, 7);  // older than the newest version: ignored
  EXPECT_THAT(order.Next(), ElementsAre(2, 3, 1, 4, 0));
  order.Used(4, 9);
  EXPECT_THAT(order.Next(), ElementsAre(4, 2, 0, 1, 3));
}

}  // namespace
}  // namespace orlop::server
