#include "server/shards/shard_info.h"

#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"

namespace orlop::server {

absl::Status ShardError(absl::StatusCode code, const ShardInfo& shard, const std::string& message,
                        v1::ErrorDetail::Reason reason) {
  v1::ErrorDetail detail;
  detail.set_reason(reason);
  detail.set_tensor(shard.tensor->name);
  detail.set_shard(shard.owned.index);
  return MakeError(code, absl::StrCat(shard.Name(), ": ", message), detail);
}

absl::Status AttemptDropped(const ShardInfo& shard) {
  return ShardError(absl::StatusCode::kAborted, shard, "the attempt was dropped",
                    v1::ErrorDetail::STALE_ATTEMPT);
}

absl::Status ShardBusy(const ShardInfo& shard, const std::string& what) {
  return ShardError(absl::StatusCode::kUnavailable, shard, what, v1::ErrorDetail::STOPPING);
}

absl::Status FirstLoadIncomplete(const ShardInfo& shard) {
  return ShardError(absl::StatusCode::kFailedPrecondition, shard,
                    "the first LOAD must set the whole weight", v1::ErrorDetail::LOADING);
}
absl::Status NotSet(const ShardInfo& shard) {
  return ShardError(absl::StatusCode::kNotFound, shard,
                    "has no value: no LOAD has set it, its worker keeps it",
                    v1::ErrorDetail::UNSET);
}

}  // namespace orlop::server
