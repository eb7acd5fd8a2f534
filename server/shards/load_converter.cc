#include "server/shards/load_converter.h"

#include <cstdint>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/casts.h"
#include "kernels/quantize.h"
#include "kernels/types.h"
#include "orlop/v1/types.pb.h"
#include "proto/dtype.h"
#include "server/job/slots.h"
#include "server/shards/load_plan.h"
#include "server/shards/shard_info.h"
#include "server/shards/slot_mapping.h"

namespace orlop::server {

LoadConverter::LoadConverter(const ShardInfo& shard, const LoadPlan& plan,
                             kernels::Rounding rounding, Plane first, Plane second)
    : shard_(shard),
      plan_(plan),
      rounding_(rounding),
      first_(std::move(first)),
      second_(std::move(second)),
      cursor_(shard, plan.box) {}

absl::Status LoadConverter::Write(uint64_t offset_bytes, absl::Span<const uint8_t> bytes) {
  if (plan_.mapping.conversion == Conversion::kCopy && first_.format.elements_per > 1)
    return CopyBlocks(offset_bytes, bytes);
  const uint64_t size = ElementBytes(plan_.dtype);
  return cursor_.Advance(bytes.size() / size, [&](uint64_t local, uint64_t count, uint64_t first) {
    return Convert(local, count, bytes.subspan(first * size, count * size));
  });
}

// Copies absmax values or packed codes as they are stored. The box is flat and has whole blocks, so
// the piece is one range of the slot.
absl::Status LoadConverter::CopyBlocks(uint64_t offset_bytes, absl::Span<const uint8_t> bytes) {
  if (!started_)
    (void)cursor_.Advance(1, [&](uint64_t local, uint64_t, uint64_t) {
      base_ = local / first_.format.elements_per;
      return absl::OkStatus();
    });
  started_ = true;
  std::memcpy(first_.data->data() + base_ * ElementBytes(plan_.dtype) + offset_bytes, bytes.data(),
              bytes.size());
  return absl::OkStatus();
}

absl::Status LoadConverter::Convert(uint64_t local, uint64_t count,
                                    absl::Span<const uint8_t> bytes) {
  if (plan_.mapping.conversion == Conversion::kCopy) {
    Copy(local, count, bytes);
    return absl::OkStatus();
  }
  const bool encodes = plan_.mapping.conversion == Conversion::kBlocks;
  if (encodes && (local % kernels::kQuantBlock != 0 ||
                  (count % kernels::kQuantBlock != 0 && local + count != shard_.count())))
    return ShardError(absl::StatusCode::kInvalidArgument, shard_,
                      absl::StrCat(SlotName(plan_.slot),
                                   ": fp32 contents of a quantised slot cover whole blocks of ",
                                   kernels::kQuantBlock));
  if (absl::Status widened = Widen(bytes, count); !widened.ok()) return widened;
  return encodes ? Encode(local, count) : Split(local, count);
}

void LoadConverter::Copy(uint64_t local, uint64_t count, absl::Span<const uint8_t> bytes) {
  if (first_.format.axis == SlotFormat::Axis::kElements) {
    std::memcpy(first_.data->data() + local * ElementBytes(plan_.dtype), bytes.data(),
                bytes.size());
    return;
  }
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t index = first_.format.AxisIndex(shard_.range().begin + local + i);
    std::memcpy(&first_.data->as<float>()[index - first_.format.axis_begin],
                bytes.data() + i * sizeof(float), sizeof(float));
  }
}

absl::Status LoadConverter::Split(uint64_t local, uint64_t count) {
  const absl::Span<uint16_t> weight = first_.data->as<uint16_t>().subspan(local, count);
  if (!second_.data) return kernels::RoundToBF16Away(values_, weight);
  if (second_.format.dtype == v1::DTYPE_I8)
    return kernels::SplitMaster24(values_, weight,
                                  second_.data->as<int8_t>().subspan(local, count));
  return kernels::SplitMaster(values_, weight, second_.data->as<int16_t>().subspan(local, count));
}

absl::Status LoadConverter::Encode(uint64_t local, uint64_t count) {
  const auto encode =
      first_.format.is_four_bit() ? kernels::RequantizeBlocks4 : kernels::RequantizeBlocks;
  return encode(CodeBookOf(plan_.slot), rounding_, values_,
                first_.data->as<uint8_t>().subspan(local / first_.format.elements_per,
                                                   first_.format.ElementCount(count)),
                second_.data->as<float>().subspan(local / second_.format.elements_per,
                                                  second_.format.ElementCount(count)));
}

absl::Status LoadConverter::Widen(absl::Span<const uint8_t> bytes, uint64_t count) {
  values_.resize(count);
  return kernels::WidenToF32({KernelDType(plan_.dtype), bytes.data(), count},
                             absl::MakeSpan(values_));
}

}  // namespace orlop::server
