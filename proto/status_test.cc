#include "proto/status.h"

#include <cstddef>
#include <string>

#include "gtest/gtest.h"

namespace orlop {
namespace {

TEST(Status, NamesAreCutBetweenCharacters) {
  EXPECT_EQ(Beginning("name", 4), "name");
  EXPECT_EQ(Beginning("names", 4), "name");
  EXPECT_EQ(Beginning("", 4), "");
  const std::string text = "a\xc3\xa9\xe6\xbc\xa2\xf0\x9f\x98\x80";  // characters of 1 to 4 bytes
  const size_t whole[] = {0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10};
  for (size_t bytes = 0; bytes <= text.size(); ++bytes)
    EXPECT_EQ(Beginning(text, bytes).size(), whole[bytes]) << bytes;
  EXPECT_EQ(Beginning(std::string(9, '\x80'), 4), "");  // no UTF-8 at all
}

}  // namespace
}  // namespace orlop
