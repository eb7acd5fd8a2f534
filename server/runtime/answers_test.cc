#include "server/runtime/answers.h"

#include "gtest/gtest.h"

namespace orlop::server {
namespace {

using v1::ErrorDetail;

// Epoch 5, generation 3, step 7 committed, attempt 2 of step 8 open.
constexpr step::Position kPosition = {5, 3, 7, 2};

absl::Status Refused() { return absl::FailedPreconditionError("refused"); }

ErrorDetail::Reason ReasonOfCommit(const absl::Status& status, uint64_t generation) {
  v1::CommitStepRequest request;
  request.set_generation(generation);
  const absl::Status explained =
      WithPosition(ExplainCommit(status, request, kPosition), kPosition, "job");
  EXPECT_EQ(explained.code(), status.code());
  return DetailOf(explained).reason();
}

ErrorDetail::Reason ReasonOfAbort(uint64_t generation, int64_t step, uint32_t attempt) {
  v1::AbortStepRequest request;
  request.set_generation(generation);
  request.set_step(step);
  request.set_attempt(attempt);
  const absl::Status explained =
      WithPosition(ExplainAbort(Refused(), request, kPosition), kPosition, "job");
  EXPECT_EQ(explained.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(DetailOf(explained).attempt(), 2u);
  return DetailOf(explained).reason();
}

TEST(Call, CommitOfAGenerationThatHasNotFormedIsStale) {
  EXPECT_EQ(ReasonOfCommit(Refused(), 4), ErrorDetail::STALE_GENERATION);
  EXPECT_EQ(ReasonOfCommit(Refused(), 3), ErrorDetail::WRONG_STEP);
  EXPECT_EQ(ReasonOfCommit(absl::AbortedError("another attempt"), 3), ErrorDetail::STALE_ATTEMPT);
  EXPECT_EQ(ReasonOfCommit(absl::UnavailableError("recovering"), 4), ErrorDetail::STOPPING);
  const absl::Status known =
      MakeError(absl::StatusCode::kFailedPrecondition, "empty shard", ErrorDetail::LOADING);
  EXPECT_EQ(ReasonOfCommit(known, 4), ErrorDetail::LOADING);
}

TEST(Call, AbortIsRefusedAsDecidedStaleOrOfAnotherStep) {
  EXPECT_EQ(ReasonOfAbort(3, 8, 2), ErrorDetail::DECIDED);
  EXPECT_EQ(ReasonOfAbort(3, 7, 1), ErrorDetail::DECIDED);
  EXPECT_EQ(ReasonOfAbort(4, 8, 2), ErrorDetail::STALE_GENERATION);
  EXPECT_EQ(ReasonOfAbort(4, 7, 1), ErrorDetail::STALE_GENERATION);
  EXPECT_EQ(ReasonOfAbort(3, 8, 3), ErrorDetail::WRONG_STEP);
  EXPECT_EQ(ReasonOfAbort(3, 9, 1), ErrorDetail::WRONG_STEP);
  EXPECT_EQ(ReasonOfAbort(3, 6, 1), ErrorDetail::WRONG_STEP);
}

}  // namespace
}  // namespace orlop::server
