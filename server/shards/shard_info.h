// What a job defines about one of its shards, and errors that name a shard.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "kernels/types.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/job/slots.h"

namespace orlop::server {

struct ShardInfo {
  OwnedShard owned;
  // Must outlive every copy of this struct.
  const Tensor* tensor = nullptr;

  int32_t id() const { return owned.id; }
  // The shard's elements in the flattened tensor, and their number.
  const Range& range() const { return owned.range; }
  uint64_t count() const { return owned.range.count(); }
  std::string Name() const {
    return absl::StrCat("tensor '", tensor->name, "', shard ", owned.index);
  }
};

// Returns an error whose message and detail name tensor and shard.
absl::Status ShardError(absl::StatusCode code, const ShardInfo& shard, const std::string& message,
                        v1::ErrorDetail::Reason reason = v1::ErrorDetail::BAD_REQUEST);
// Aborted (STALE_ATTEMPT): the attempt of a stage is over.
absl::Status AttemptDropped(const ShardInfo& shard);
// Unavailable: another call works on the shard, and the caller should try again. `what` says which:
// "is being applied".
absl::Status ShardBusy(const ShardInfo& shard, const std::string& what);
// FailedPrecondition (LOADING): the first LOAD of a job leaves part of this weight unset.
absl::Status FirstLoadIncomplete(const ShardInfo& shard);
// NotFound (UNSET): no LOAD has set the tensor (TensorSpec.may_be_unset).
absl::Status NotSet(const ShardInfo& shard);

// Returns the kernels' name of a dtype, which must be F32, BF16 or F16.
inline kernels::DType KernelDType(v1::DType dtype) {
  return dtype == v1::DTYPE_F32    ? kernels::DType::kF32
         : dtype == v1::DTYPE_BF16 ? kernels::DType::kBF16
                                   : kernels::DType::kF16;
}

}  // namespace orlop::server
