#include "server/runtime/answers.h"

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/job/step_codec.h"
#include "server/step/actions.h"

namespace orlop::server {
namespace {

v1::ErrorDetail::Reason ReasonOf(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInvalidArgument:
      return v1::ErrorDetail::BAD_REQUEST;
    case absl::StatusCode::kNotFound:
      return v1::ErrorDetail::NOT_OWNER;
    case absl::StatusCode::kAlreadyExists:
      return v1::ErrorDetail::CONFLICT;
    case absl::StatusCode::kAborted:
      return v1::ErrorDetail::STALE_ATTEMPT;
    case absl::StatusCode::kOutOfRange:
      return v1::ErrorDetail::VERSION_GONE;
    case absl::StatusCode::kResourceExhausted:
      return v1::ErrorDetail::BUDGET;
    case absl::StatusCode::kDataLoss:
      return v1::ErrorDetail::LOST;
    case absl::StatusCode::kUnavailable:
      return v1::ErrorDetail::STOPPING;
    case absl::StatusCode::kFailedPrecondition:
      return v1::ErrorDetail::WRONG_STEP;
    default:
      return v1::ErrorDetail::REASON_UNSPECIFIED;
  }
}

}  // namespace

absl::Status CheckLossScale(double loss_scale) {
  if (loss_scale == 0 || (loss_scale >= kMinLossScale && loss_scale <= kMaxLossScale))
    return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("loss_scale ", loss_scale, " must be 0 or from ",
                                                 kMinLossScale, " to ", kMaxLossScale));
}

absl::Status WithPosition(absl::Status status, const step::Position& position,
                          const std::string& job) {
  if (status.ok()) return status;
  v1::ErrorDetail detail = DetailOfStep(status);
  if (detail.reason() == v1::ErrorDetail::REASON_UNSPECIFIED)
    detail.set_reason(ReasonOf(status.code()));
  const absl::StatusCode code = detail.reason() == v1::ErrorDetail::STALE_GENERATION
                                    ? absl::StatusCode::kFailedPrecondition
                                    : status.code();
  if (detail.job().empty()) detail.set_job(job);
  detail.set_epoch(static_cast<uint64_t>(position.epoch));
  detail.set_generation(static_cast<uint64_t>(position.generation));
  detail.set_attempt(static_cast<uint32_t>(position.attempt));
  if (!detail.has_version()) detail.set_version(position.committed_step);
  return MakeError(code, std::string(status.message()), detail);
}

}  // namespace orlop::server
