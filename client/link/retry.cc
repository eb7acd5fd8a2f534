#include "client/link/retry.h"

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "absl/status/status.h"
#include "base/mutex.h"
#include "client/link/parts.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"

namespace orlop::client {
namespace {

using v1::ErrorDetail;

bool IsData(Rpc rpc) { return rpc == Rpc::kPush || rpc == Rpc::kPull; }

// An error without a reason is not from a server of ours: the connection failed, or a proxy
// answered. Nothing is known about the effect of the call.
Verdict JudgeTransport(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kUnavailable:
    // The server closed during the call. Calls that this client cancels are not judged.
    case absl::StatusCode::kCancelled:
    // gRPC reports a removed stream with this code.
    case absl::StatusCode::kUnknown:
    // gRPC reports a reset stream with this code.
    case absl::StatusCode::kInternal:
    // gRPC has no thread or memory left for the call.
    case absl::StatusCode::kResourceExhausted:
      return Verdict::kBackOff;
    default:
      return Verdict::kGiveUp;
  }
}

}  // namespace

Verdict Judge(Rpc rpc, const absl::Status& status) {
  if (status.code() == absl::StatusCode::kDeadlineExceeded) return Verdict::kGiveUp;
  const ErrorDetail::Reason reason = DetailOf(status).reason();
  switch (reason) {
    case ErrorDetail::NOT_LEADER:
      return IsData(rpc) ? Verdict::kGiveUp : Verdict::kFollow;
    case ErrorDetail::STALE_EPOCH:
      return IsData(rpc) || rpc == Rpc::kCommit ? Verdict::kRefresh : Verdict::kGiveUp;
    case ErrorDetail::NOT_OWNER:
      return IsData(rpc) ? Verdict::kRefresh : Verdict::kGiveUp;
    case ErrorDetail::CHECKSUM:
      return IsData(rpc) ? Verdict::kRepeat : Verdict::kGiveUp;
    // Staging is freed when the step ends, so a data call can succeed later. A job that does not
    // fit never will.
    case ErrorDetail::BUDGET:
      return IsData(rpc) ? Verdict::kBackOff : Verdict::kGiveUp;
    case ErrorDetail::STOPPING:
    case ErrorDetail::BUSY:
      return Verdict::kBackOff;
    case ErrorDetail::REASON_UNSPECIFIED:
      return JudgeTransport(status.code());
    default:
      return status.code() == absl::StatusCode::kUnavailable ? Verdict::kBackOff : Verdict::kGiveUp;
  }
}

bool RetryBudget::Spend(Clock::time_point now) {
  MutexLock lock(&mutex_);
  if (last_ == Clock::time_point{}) last_ = now;
  const double seconds = std::chrono::duration<double>(now - last_).count();
  left_ = std::min(options_.budget, left_ + std::max(0.0, seconds) * options_.budget_per_second);
  last_ = std::max(last_, now);
  if (left_ < 1) return false;
  left_ -= 1;
  ++spent_;
  return true;
}

uint64_t RetryBudget::spent() const {
  MutexLock lock(&mutex_);
  return spent_;
}

Milliseconds BackoffBefore(int number, uint32_t random, const RetryOptions& options) {
  const int64_t first = options.first_backoff.count(), longest = options.longest_backoff.count();
  const int64_t whole = std::min(longest, first << std::min(number, 20));
  return Milliseconds(whole / 2 + static_cast<int64_t>(random % (whole / 2 + 1)));
}

}  // namespace orlop::client
