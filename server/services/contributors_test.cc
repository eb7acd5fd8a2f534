#include "server/services/contributors.h"

#include <string>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace orlop::server {
namespace {

TEST(Contributors, ARankIsWhoseItWasWhenItJoined) {
  Contributors contributors;
  EXPECT_TRUE(contributors.Check("j", 1, 0, "b").ok()) << "nobody has joined";
  contributors.Joined("j", 1, 0, "a");
  contributors.Joined("j", 1, 1, "b");
  EXPECT_TRUE(contributors.Check("j", 1, 0, "a").ok());
  const absl::Status denied = contributors.Check("j", 1, 0, "b");
  EXPECT_TRUE(absl::IsPermissionDenied(denied));
  EXPECT_THAT(std::string(denied.message()), testing::HasSubstr("rank 0 of generation 1"));
  contributors.Joined("j", 1, 0, "b");
  EXPECT_FALSE(contributors.Check("j", 1, 0, "b").ok()) << "the first one keeps it";
  EXPECT_TRUE(contributors.Check("k", 1, 0, "b").ok()) << "another job";
}

TEST(Contributors, RemembersTwoGenerations) {
  Contributors contributors;
  for (const int generation : {1, 2, 3}) contributors.Joined("j", generation, 0, "a");
  EXPECT_TRUE(contributors.Check("j", 1, 0, "b").ok());
  EXPECT_FALSE(contributors.Check("j", 2, 0, "b").ok());
  EXPECT_FALSE(contributors.Check("j", 3, 0, "b").ok());
  contributors.Forget("j");
  EXPECT_TRUE(contributors.Check("j", 3, 0, "b").ok());
}

}  // namespace
}  // namespace orlop::server
