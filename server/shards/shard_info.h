// One shard as its job defines it, and errors about it.
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
  const Tensor* tensor = nullptr;  // outlives all that is made of this

  int32_t id() const { return owned.id; }
  const Range& range() const { return owned.range; }
  uint64_t count() const { return owned.range.count(); }
  std::string Name() const {
    return absl::StrCat("tensor '", tensor->name, "', shard ", owned.index);
  }
};

// An error about a shard, with its detail.
absl::Status ShardError(absl::StatusCode code, const ShardInfo& shard, const std::string& message,
                        v1::ErrorDetail::Reason reason = v1::ErrorDetail::BAD_REQUEST);
// What was staged belongs to an attempt that is over.
absl::Status AttemptDropped(const ShardInfo& shard);
// Another call works on the shard: try again.
absl::Status ShardBusy(const ShardInfo& shard, const std::string& what);

absl::Status FirstLoadIncomplete(const ShardInfo& shard);

// `dtype` is F32, BF16 or F16.
inline kernels::DType KernelDType(v1::DType dtype) {
  return dtype == v1::DTYPE_F32    ? kernels::DType::kF32
         : dtype == v1::DTYPE_BF16 ? kernels::DType::kBF16
                                   : kernels::DType::kF16;
}

}  // namespace orlop::server
