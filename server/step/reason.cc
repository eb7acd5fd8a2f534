#include "server/step/reason.h"

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace orlop::step {
namespace {

constexpr char kReasonUrl[] = "orlop.step.Reason";
constexpr char kTensorUrl[] = "orlop.step.Tensor";
constexpr char kShardUrl[] = "orlop.step.Shard";

uint64_t NumberIn(const absl::Status& status, const char* url) {
  uint64_t number = 0;
  const auto payload = status.GetPayload(url);
  if (payload.has_value() && !absl::SimpleAtoi(std::string(*payload), &number)) return 0;
  return number;
}

}  // namespace

absl::Status Because(Reason reason, absl::Status status) {
  status.SetPayload(kReasonUrl, absl::Cord(absl::StrCat(static_cast<int>(reason))));
  return status;
}

Reason ReasonOf(const absl::Status& status) {
  return static_cast<Reason>(NumberIn(status, kReasonUrl));
}

absl::Status StaleEpoch(int64_t epoch, int64_t current) {
  return Because(Reason::kStaleEpoch,
                 absl::FailedPreconditionError(
                     absl::StrCat("epoch ", epoch, " is over; it is ", current, ": rejoin")));
}

absl::Status StaleGeneration(int64_t generation, int64_t current) {
  return Because(Reason::kStaleGeneration,
                 absl::AbortedError(absl::StrCat("generation ", generation, " is over; ", current,
                                                 " contributes")));
}

absl::Status About(const ShardName& shard, absl::Status status) {
  status.SetPayload(kTensorUrl, absl::Cord(shard.tensor));
  status.SetPayload(kShardUrl, absl::Cord(absl::StrCat(shard.index)));
  return status;
}

std::optional<ShardName> ShardOf(const absl::Status& status) {
  const auto tensor = status.GetPayload(kTensorUrl);
  if (!tensor.has_value()) return std::nullopt;
  return ShardName{std::string(*tensor), NumberIn(status, kShardUrl)};
}

}  // namespace orlop::step
