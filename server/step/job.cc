#include "server/step/job.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "server/step/identity.h"
#include "server/step/layout.h"

namespace orlop::step {
namespace {

absl::Status CheckCopies(const JobSpec& spec, size_t index) {
  const ShardSpec& shard = spec.shards[index];
  const std::string& tensor = spec.tensors[shard.tensor].name;
  if (shard.copies.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("shard ", index, " of tensor ", tensor, " has no copy"));
  }
  for (size_t i = 0; i < shard.copies.size(); ++i) {
    const ServerId server = shard.copies[i];
    if (server < 0 || server >= spec.server_count) {
      return absl::InvalidArgumentError(absl::StrCat("shard ", index, " of tensor ", tensor,
                                                     " is placed on server ", server, " of ",
                                                     spec.server_count));
    }
    if (std::find(shard.copies.begin(), shard.copies.begin() + i, server) !=
        shard.copies.begin() + i) {
      return absl::InvalidArgumentError(absl::StrCat("shard ", index, " of tensor ", tensor,
                                                     " is placed twice on server ", server));
    }
  }
  return absl::OkStatus();
}

}  // namespace

const char* ToString(Level level) {
  switch (level) {
    case Level::kMemory:
      return "MEMORY";
    case Level::kJournaled:
      return "JOURNALED";
    case Level::kReplicated:
      return "REPLICATED";
    case Level::kReplicatedJournaled:
      return "REPLICATED_JOURNALED";
  }
  return "unknown level";
}

const char* ToString(DecisionKind kind) {
  switch (kind) {
    case DecisionKind::kApply:
      return "APPLY";
    case DecisionKind::kSkip:
      return "SKIP";
    case DecisionKind::kLoad:
      return "LOAD";
  }
  return "unknown decision";
}

absl::Status ValidateJobSpec(const JobSpec& spec) {
  size_t next = 0;
  for (size_t tensor = 0; tensor < spec.tensors.size(); ++tensor) {
    const absl::StatusOr<uint64_t> total = ElementCount(spec.tensors[tensor].shape);
    if (!total.ok()) return total.status();
    uint64_t covered = 0;
    for (; next < spec.shards.size() && spec.shards[next].tensor == static_cast<TensorId>(tensor);
         ++next) {
      const ShardSpec& shard = spec.shards[next];
      if (shard.range.begin != covered || shard.range.empty() || shard.range.end > *total) break;
      covered = shard.range.end;
      if (absl::Status status = CheckCopies(spec, next); !status.ok()) return status;
    }
    if (covered != *total) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", spec.tensors[tensor].name,
                                                     ": shards tile ", covered, " of ", *total,
                                                     " elements in order"));
    }
  }
  if (next != spec.shards.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("shard ", next, " is out of manifest order or of an unknown tensor"));
  }
  return absl::OkStatus();
}

Digest Identify(const DecisionRecord& decision) {
  DigestBuilder builder;
  builder.Add(decision.generation).Add(decision.step).Add(decision.attempt);
  builder.Add(static_cast<uint64_t>(decision.kind)).Add(decision.arithmetic_version);
  builder.Add(decision.previous).Add(decision.staged);
  builder.AddDouble(decision.scale).AddDouble(decision.sum_of_squares);
  builder.Add(decision.non_finite_count).AddBytes(decision.scalars);
  builder.Add(decision.applied_count.size());
  for (int64_t count : decision.applied_count) builder.Add(count);
  builder.Add(decision.untouched.size());
  for (uint8_t untouched : decision.untouched) builder.Add(untouched);
  return builder.Finish();
}

}  // namespace orlop::step
