#include "client/link/retry.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "absl/status/status.h"
#include "client/link/parts.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"

namespace orlop::client {
namespace {

using absl::StatusCode;
using v1::ErrorDetail;

TEST(Judge, DecidesByCodeAndReasonPerRpc) {
  const struct {
    Rpc rpc;
    StatusCode code;
    ErrorDetail::Reason reason;
    Verdict verdict;
  } cases[] = {
      {Rpc::kRead, StatusCode::kUnavailable, ErrorDetail::REASON_UNSPECIFIED, Verdict::kBackOff},
      {Rpc::kCommit, StatusCode::kUnavailable, ErrorDetail::STOPPING, Verdict::kBackOff},
      {Rpc::kChange, StatusCode::kUnavailable, ErrorDetail::REASON_UNSPECIFIED, Verdict::kBackOff},
      {Rpc::kChange, StatusCode::kFailedPrecondition, ErrorDetail::NOT_LEADER, Verdict::kFollow},
      {Rpc::kPush, StatusCode::kFailedPrecondition, ErrorDetail::STALE_EPOCH, Verdict::kRefresh},
      {Rpc::kCommit, StatusCode::kFailedPrecondition, ErrorDetail::STALE_EPOCH, Verdict::kRefresh},
      {Rpc::kPull, StatusCode::kNotFound, ErrorDetail::NOT_OWNER, Verdict::kRefresh},
      {Rpc::kPush, StatusCode::kAborted, ErrorDetail::CHECKSUM, Verdict::kRepeat},
      {Rpc::kPush, StatusCode::kResourceExhausted, ErrorDetail::BUDGET, Verdict::kBackOff},
      {Rpc::kChange, StatusCode::kResourceExhausted, ErrorDetail::BUDGET, Verdict::kGiveUp},
      {Rpc::kChange, StatusCode::kResourceExhausted, ErrorDetail::BUSY, Verdict::kBackOff},
      {Rpc::kRead, StatusCode::kResourceExhausted, ErrorDetail::REASON_UNSPECIFIED,
       Verdict::kBackOff},
      {Rpc::kRead, StatusCode::kPermissionDenied, ErrorDetail::DENIED, Verdict::kGiveUp},
      {Rpc::kChange, StatusCode::kFailedPrecondition, ErrorDetail::QUARANTINED, Verdict::kGiveUp},
      {Rpc::kPush, StatusCode::kAborted, ErrorDetail::STALE_ATTEMPT, Verdict::kGiveUp},
      {Rpc::kPush, StatusCode::kFailedPrecondition, ErrorDetail::STALE_GENERATION,
       Verdict::kGiveUp},
      {Rpc::kPull, StatusCode::kOutOfRange, ErrorDetail::VERSION_GONE, Verdict::kGiveUp},
      {Rpc::kPull, StatusCode::kDataLoss, ErrorDetail::LOST, Verdict::kGiveUp},
      {Rpc::kRead, StatusCode::kDeadlineExceeded, ErrorDetail::REASON_UNSPECIFIED,
       Verdict::kGiveUp},
      {Rpc::kPull, StatusCode::kInvalidArgument, ErrorDetail::REASON_UNSPECIFIED, Verdict::kGiveUp},
  };
  for (const auto& c : cases)
    EXPECT_EQ(Judge(c.rpc, MakeError(c.code, "any text", c.reason)), c.verdict)
        << static_cast<int>(c.rpc) << " " << ErrorDetail::Reason_Name(c.reason);
}

TEST(RetryBudget, IsSpentAndComesBackWithTime) {
  RetryBudget budget({.budget = 2, .budget_per_second = 1});
  const RetryBudget::Clock::time_point start{std::chrono::hours(1)};
  EXPECT_TRUE(budget.Spend(start));
  EXPECT_TRUE(budget.Spend(start));
  EXPECT_FALSE(budget.Spend(start));
  EXPECT_FALSE(budget.Spend(start + Milliseconds(900)));
  EXPECT_TRUE(budget.Spend(start + Milliseconds(1100)));
  EXPECT_EQ(budget.spent(), 3u);
}

TEST(BackoffBefore, DoublesWithinItsLimits) {
  const RetryOptions options{.first_backoff = Milliseconds(20),
                             .longest_backoff = Milliseconds(500)};
  for (int number = 0; number < 40; ++number) {
    const int64_t whole = std::min<int64_t>(500, int64_t{20} << std::min(number, 20));
    EXPECT_EQ(BackoffBefore(number, 0, options).count(), whole / 2);
    for (uint32_t random : {7u, 12345u, ~0u}) {
      EXPECT_GE(BackoffBefore(number, random, options).count(), whole / 2);
      EXPECT_LE(BackoffBefore(number, random, options).count(), whole);
    }
  }
}

}  // namespace
}  // namespace orlop::client
