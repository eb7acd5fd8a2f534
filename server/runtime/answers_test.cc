#include "server/runtime/answers.h"

#include <cstddef>
#include <iterator>
#include <utility>

#include "absl/status/status.h"
#include "gtest/gtest.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/step/actions.h"
#include "server/step/reason.h"

namespace orlop::server {
namespace {

using step::Reason;
using v1::ErrorDetail;

// Epoch 5, generation 3, step 7 committed, attempt 2 of step 8 open.
constexpr step::Position kPosition = {5, 3, 7, 2};

ErrorDetail DetailOnTheWire(const absl::Status& status) {
  return DetailOf(WithPosition(status, kPosition, "job"));
}

TEST(Answers, EveryReasonOfTheMachinesHasItsNameOnTheWire) {
  const std::pair<Reason, ErrorDetail::Reason> pairs[] = {
      {Reason::kBadRequest, ErrorDetail::BAD_REQUEST},
      {Reason::kUnknownJob, ErrorDetail::UNKNOWN_JOB},
      {Reason::kUnknownTensor, ErrorDetail::UNKNOWN_TENSOR},
      {Reason::kNotOwner, ErrorDetail::NOT_OWNER},
      {Reason::kNotLeader, ErrorDetail::NOT_LEADER},
      {Reason::kStaleEpoch, ErrorDetail::STALE_EPOCH},
      {Reason::kStaleGeneration, ErrorDetail::STALE_GENERATION},
      {Reason::kStaleAttempt, ErrorDetail::STALE_ATTEMPT},
      {Reason::kWrongStep, ErrorDetail::WRONG_STEP},
      {Reason::kLoading, ErrorDetail::LOADING},
      {Reason::kConflict, ErrorDetail::CONFLICT},
      {Reason::kVersionGone, ErrorDetail::VERSION_GONE},
      {Reason::kChecksum, ErrorDetail::CHECKSUM},
      {Reason::kBudget, ErrorDetail::BUDGET},
      {Reason::kRollbackOffered, ErrorDetail::ROLLBACK_OFFERED},
      {Reason::kLost, ErrorDetail::LOST},
      {Reason::kHyperParameters, ErrorDetail::HYPER_PARAMETERS},
      {Reason::kDecided, ErrorDetail::DECIDED},
      {Reason::kStopping, ErrorDetail::STOPPING}};
  EXPECT_EQ(std::size(pairs), static_cast<size_t>(ErrorDetail::STOPPING));
  for (const auto& [reason, name] : pairs) {
    const absl::Status status = step::Because(reason, absl::FailedPreconditionError("refused"));
    EXPECT_EQ(DetailOnTheWire(status).reason(), name) << ErrorDetail::Reason_Name(name);
  }
}

TEST(Answers, ACodeWithoutAReasonHasTheReasonOfItsKind) {
  EXPECT_EQ(DetailOnTheWire(absl::FailedPreconditionError("refused")).reason(),
            ErrorDetail::WRONG_STEP);
  EXPECT_EQ(DetailOnTheWire(absl::AbortedError("another attempt")).reason(),
            ErrorDetail::STALE_ATTEMPT);
  EXPECT_EQ(DetailOnTheWire(absl::UnavailableError("recovering")).reason(), ErrorDetail::STOPPING);
  const absl::Status known =
      MakeError(absl::StatusCode::kFailedPrecondition, "empty shard", ErrorDetail::LOADING);
  EXPECT_EQ(DetailOnTheWire(known).reason(), ErrorDetail::LOADING);
}

TEST(Answers, AnOlderGenerationIsFailedPreconditionOnTheWire) {
  const absl::Status status = WithPosition(step::StaleGeneration(2, 3), kPosition, "job");
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(DetailOf(status).reason(), ErrorDetail::STALE_GENERATION);
}

TEST(Answers, AnErrorTellsShardAndPosition) {
  const ErrorDetail detail = DetailOnTheWire(step::About(
      {"w", 4}, step::Because(Reason::kLoading, absl::FailedPreconditionError("empty"))));
  EXPECT_EQ(detail.reason(), ErrorDetail::LOADING);
  EXPECT_EQ(detail.tensor(), "w");
  EXPECT_EQ(detail.shard(), 4u);
  EXPECT_EQ(detail.job(), "job");
  EXPECT_EQ(detail.epoch(), 5u);
  EXPECT_EQ(detail.generation(), 3u);
  EXPECT_EQ(detail.attempt(), 2u);
  EXPECT_EQ(detail.version(), 7);
}

}  // namespace
}  // namespace orlop::server
