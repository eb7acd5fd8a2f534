#include "server/shards/slot_mapping.h"

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "orlop/v1/types.pb.h"
#include "proto/dtype.h"
#include "server/job/slots.h"
#include "server/shards/shard_info.h"

namespace orlop::server {

absl::StatusOr<SlotMapping> MapSlot(const ShardInfo& shard, const SlotFormats& formats, Slot slot,
                                    v1::DType dtype, absl::string_view verb) {
  const bool is_parameter = shard.tensor->is_parameter;
  const Slot stored = slot == Slot::kMaster ? Slot::kWeight : slot;
  const SlotFormat& format = formats[SlotIndex(stored)];
  if (!format.exists() || (slot == Slot::kMaster && !is_parameter))
    return ShardError(absl::StatusCode::kInvalidArgument, shard,
                      absl::StrCat("has no slot ", SlotName(slot)));
  if (is_parameter && stored == Slot::kWeight &&
      (dtype == v1::DTYPE_F32 || (dtype == v1::DTYPE_F16 && slot == Slot::kWeight))) {
    SlotMapping mapping{Conversion::kMaster, Slot::kWeight};
    if (formats[SlotIndex(Slot::kRemainder)].exists()) mapping.second = Slot::kRemainder;
    return mapping;
  }
  if (slot != Slot::kMaster && dtype == format.dtype) return SlotMapping{Conversion::kCopy, stored};
  if (is_parameter && format.dtype == v1::DTYPE_U8 && dtype == v1::DTYPE_F32)
    return SlotMapping{Conversion::kBlocks, stored, AbsmaxSlot(stored)};
  return ShardError(
      absl::StatusCode::kInvalidArgument, shard,
      absl::StrCat("cannot ", verb, " ", SlotName(slot), " as ", std::string(DTypeName(dtype)),
                   "; it is stored as ", std::string(DTypeName(format.dtype))));
}

}  // namespace orlop::server
