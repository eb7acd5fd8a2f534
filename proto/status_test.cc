#include "proto/status.h"

#include <grpcpp/support/status.h>

#include <cstddef>
#include <string>

#include "absl/status/status.h"
#include "gtest/gtest.h"
#include "orlop/v1/types.pb.h"

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

// A name that a caller has sent may have megabytes.
TEST(Status, LongErrorIsCutToWhatTrailersHold) {
  std::string name;
  while (name.size() < 20'000) name += "\xd0\xb6";
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::BAD_REQUEST);
  detail.set_job(name);
  detail.set_actual(name);
  const grpc::Status sent =
      ToGrpc(MakeError(absl::StatusCode::kInvalidArgument, "no job " + name, detail));
  EXPECT_EQ(sent.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(sent.error_message(), "no job " + name.substr(0, 1528));
  v1::ErrorDetail read;
  ASSERT_TRUE(read.ParseFromString(sent.error_details()));
  EXPECT_EQ(read.reason(), v1::ErrorDetail::BAD_REQUEST);
  EXPECT_EQ(read.job(), name.substr(0, 256));
  EXPECT_EQ(read.actual(), name.substr(0, 256));
  EXPECT_EQ(read.tensor(), "");
}

}  // namespace
}  // namespace orlop
