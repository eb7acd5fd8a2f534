#include "server/shards/load_plan.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "kernels/types.h"
#include "orlop/v1/types.pb.h"
#include "proto/dtype.h"
#include "server/job/slots.h"
#include "server/shards/shard_info.h"
#include "server/shards/slot_mapping.h"

namespace orlop::server {
namespace {

// Returns how many elements a piece of a blocked slot (codes or absmax) sends: stored elements if
// they are copied, otherwise fp32 values. Checks that the box has whole blocks.
absl::StatusOr<uint64_t> ElementsOfBlocks(const ShardInfo& shard, const SlotFormat& format,
                                          const LoadPlan& plan, uint64_t box_elements) {
  const bool is_copy = plan.mapping.conversion == Conversion::kCopy;
  if (!plan.box.flat) {
    if (!is_copy) return box_elements;  // LoadConverter checks every run
    return ShardError(absl::StatusCode::kInvalidArgument, shard,
                      absl::StrCat(SlotName(plan.slot), " is set by flat boxes"));
  }
  const Range flat = {std::max(plan.box.offset[0], shard.range().begin),
                      std::min(plan.box.offset[0] + plan.box.extent[0], shard.range().end)};
  if (flat.begin % kernels::kQuantBlock != 0 ||
      (flat.end % kernels::kQuantBlock != 0 && flat.end != shard.tensor->element_count))
    return ShardError(absl::StatusCode::kInvalidArgument, shard,
                      absl::StrCat(SlotName(plan.slot), ": box ", ToString(plan.box),
                                   " is not whole blocks of ", kernels::kQuantBlock));
  return is_copy ? format.ElementCount(flat.count()) : box_elements;
}

}  // namespace

absl::StatusOr<LoadPlan> PlanLoad(const ShardInfo& shard, const SlotFormats& formats, Slot slot,
                                  v1::DType dtype, const Box& box) {
  const Tensor& tensor = *shard.tensor;
  if (absl::Status valid = ValidateBox(box, tensor.shape, tensor.element_count); !valid.ok())
    return ShardError(valid.code(), shard, std::string(valid.message()));
  LoadPlan plan{slot, dtype, Simplified(box, tensor.shape)};
  const Range part = BoxPart(plan.box, tensor.shape, shard.range());
  if (part.empty())
    return ShardError(absl::StatusCode::kInvalidArgument, shard,
                      absl::StrCat("box ", ToString(box), " does not touch it"));
  auto mapping = MapSlot(shard, formats, slot, dtype, "set");
  if (!mapping.ok()) return mapping.status();
  plan.mapping = *mapping;
  const SlotFormat& format = formats[SlotIndex(mapping->first)];
  if (absl::Status valid = format.CheckBox(tensor.shape, box, slot); !valid.ok())
    return ShardError(valid.code(), shard, std::string(valid.message()));
  absl::StatusOr<uint64_t> elements = part.count();
  if (format.elements_per > 1 || mapping->conversion == Conversion::kBlocks)
    elements = ElementsOfBlocks(shard, format, plan, part.count());
  if (!elements.ok()) return elements.status();
  plan.total_bytes = *elements * ElementBytes(dtype);
  plan.is_whole = part.count() == shard.count();
  return plan;
}

bool Overlap(const ShardInfo& shard, const Box& a, const Box& b) {
  if (a.flat || b.flat) {
    const Box& flat = a.flat ? a : b;
    const Box& other = a.flat ? b : a;
    const Range range = {std::max(flat.offset[0], shard.range().begin),
                         std::min(flat.offset[0] + flat.extent[0], shard.range().end)};
    return !range.empty() && !BoxPart(other, shard.tensor->shape, range).empty();
  }
  for (size_t i = 0; i < a.offset.size(); ++i)
    if (a.offset[i] + a.extent[i] <= b.offset[i] || b.offset[i] + b.extent[i] <= a.offset[i])
      return false;
  return true;
}

}  // namespace orlop::server
