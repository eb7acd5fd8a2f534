#include "server/runtime/answers.h"

#include "absl/strings/str_cat.h"
#include "proto/limits.h"

namespace orlop::server {
namespace {

v1::ErrorDetail::Reason ReasonOf(const absl::Status& status, const step::Position& position) {
  switch (status.code()) {
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
      return position.committed_step == step::kLoading ? v1::ErrorDetail::LOADING
                                                       : v1::ErrorDetail::WRONG_STEP;
    default:
      return v1::ErrorDetail::REASON_UNSPECIFIED;
  }
}

bool IsUnexplained(const absl::Status& status) {
  return status.code() == absl::StatusCode::kFailedPrecondition &&
         DetailOf(status).reason() == v1::ErrorDetail::REASON_UNSPECIFIED;
}

bool HasNotFormed(uint64_t generation, const step::Position& position) {
  return generation > static_cast<uint64_t>(position.generation);
}

}  // namespace

absl::Status CheckNotStale(uint64_t epoch, uint64_t generation, const step::Position& position) {
  if (epoch != 0 && static_cast<int64_t>(epoch) < position.epoch) {
    return MakeError(absl::StatusCode::kFailedPrecondition,
                     absl::StrCat("epoch ", epoch, " is over; it is ", position.epoch, ": rejoin"),
                     v1::ErrorDetail::STALE_EPOCH);
  }
  if (generation != 0 && static_cast<int64_t>(generation) < position.generation) {
    return MakeError(
        absl::StatusCode::kFailedPrecondition,
        absl::StrCat("generation ", generation, " is over; ", position.generation, " contributes"),
        v1::ErrorDetail::STALE_GENERATION);
  }
  return absl::OkStatus();
}

absl::Status CheckLossScale(double loss_scale) {
  if (loss_scale == 0 || (loss_scale >= kMinLossScale && loss_scale <= kMaxLossScale))
    return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("loss_scale ", loss_scale, " must be 0 or from ",
                                                 kMinLossScale, " to ", kMaxLossScale));
}

absl::Status CheckControlSize(const google::protobuf::Message& request) {
  const size_t bytes = request.ByteSizeLong();
  if (bytes <= kMaxControlMessageBytes) return absl::OkStatus();
  return MakeError(absl::StatusCode::kInvalidArgument,
                   absl::StrCat(request.GetDescriptor()->name(), " has ", bytes,
                                " bytes; the limit is ", kMaxControlMessageBytes),
                   v1::ErrorDetail::BAD_REQUEST);
}

absl::Status ExplainCommit(absl::Status status, const v1::CommitStepRequest& request,
                           const step::Position& position) {
  if (!IsUnexplained(status) || !HasNotFormed(request.generation(), position)) return status;
  return MakeError(status.code(), std::string(status.message()), v1::ErrorDetail::STALE_GENERATION);
}

absl::Status ExplainAbort(absl::Status status, const v1::AbortStepRequest& request,
                          const step::Position& position) {
  if (!IsUnexplained(status)) return status;
  const bool is_open = request.generation() == static_cast<uint64_t>(position.generation) &&
                       request.step() == position.committed_step + 1 &&
                       request.attempt() == static_cast<uint64_t>(position.attempt);
  v1::ErrorDetail::Reason reason = v1::ErrorDetail::WRONG_STEP;
  if (HasNotFormed(request.generation(), position)) {
    reason = v1::ErrorDetail::STALE_GENERATION;
  } else if (request.step() == position.committed_step || is_open) {
    reason = v1::ErrorDetail::DECIDED;
  }
  return MakeError(status.code(), std::string(status.message()), reason);
}

absl::Status WithPosition(absl::Status status, const step::Position& position,
                          const std::string& job) {
  if (status.ok()) return status;
  v1::ErrorDetail detail = DetailOf(status);
  if (detail.reason() == v1::ErrorDetail::REASON_UNSPECIFIED)
    detail.set_reason(ReasonOf(status, position));
  if (detail.job().empty()) detail.set_job(job);
  detail.set_epoch(static_cast<uint64_t>(position.epoch));
  detail.set_generation(static_cast<uint64_t>(position.generation));
  detail.set_attempt(static_cast<uint32_t>(position.attempt));
  if (!detail.has_version()) detail.set_version(position.committed_step);
  return MakeError(status.code(), std::string(status.message()), detail);
}

}  // namespace orlop::server
