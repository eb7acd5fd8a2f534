#include "server/shard_spec.h"

#include "absl/strings/str_cat.h"
#include "kernels/types.h"
#include "proto/dtype.h"

namespace orlop::server {
namespace {

constexpr const char* kNames[] = {
    "weight",     "remainder",         "exp_avg",         "exp_avg_absmax",
    "exp_avg_sq", "exp_avg_sq_absmax", "momentum_buffer", "momentum_buffer_absmax",
    "master"};
constexpr uint64_t kLeast8BitElements = 4096;

SlotFormat Moment(const TensorOptimizer& optimizer, uint8_t zero_code) {
  if (optimizer.eight_bit) return {v1::DTYPE_U8, false, zero_code};
  return {v1::DTYPE_F32};
}
SlotFormat Scales(const TensorOptimizer& optimizer) {
  return optimizer.eight_bit ? SlotFormat{v1::DTYPE_F32, true} : SlotFormat{};
}

}  // namespace

const char* SlotName(Slot slot) { return kNames[static_cast<size_t>(slot)]; }

absl::StatusOr<Slot> ParseSlot(absl::string_view name) {
  if (name.empty()) return Slot::kWeight;
  for (size_t i = 0; i < std::size(kNames); ++i)
    if (name == kNames[i]) return static_cast<Slot>(i);
  return absl::InvalidArgumentError(absl::StrCat("unknown slot '", name, "'"));
}

bool EightBitState(const Tensor& tensor, bool listed_as_fp32) {
  return !listed_as_fp32 && tensor.element_count >= kLeast8BitElements && tensor.shape.size() > 1;
}

uint64_t SlotFormat::ElementCount(uint64_t shard_elements) const {
  return per_block ? kernels::BlockCount(shard_elements) : shard_elements;
}
uint64_t SlotFormat::Bytes(uint64_t shard_elements) const {
  return exists() ? ElementCount(shard_elements) * ElementBytes(dtype) : 0;
}

SlotFormat FormatOf(const Tensor& tensor, const TensorOptimizer& optimizer, Slot slot) {
  if (!tensor.is_parameter) return slot == Slot::kWeight ? SlotFormat{tensor.dtype} : SlotFormat{};
  const bool adamw = optimizer.optimizer == OptimizerKind::kAdamW;
  const bool sgd = optimizer.optimizer == OptimizerKind::kSgd;
  switch (slot) {
    case Slot::kWeight:
      return {v1::DTYPE_BF16};
    case Slot::kRemainder:
      return adamw || sgd || tensor.dtype != v1::DTYPE_BF16 ? SlotFormat{v1::DTYPE_I16}
                                                            : SlotFormat{};
    case Slot::kExpAvg:
      return adamw ? Moment(optimizer, kernels::kSignedZeroCode) : SlotFormat{};
    case Slot::kExpAvgSq:
      return adamw ? Moment(optimizer, kernels::kUnsignedZeroCode) : SlotFormat{};
    case Slot::kMomentumBuffer:
      return sgd ? Moment(optimizer, kernels::kSignedZeroCode) : SlotFormat{};
    case Slot::kExpAvgAbsmax:
    case Slot::kExpAvgSqAbsmax:
      return adamw ? Scales(optimizer) : SlotFormat{};
    case Slot::kMomentumBufferAbsmax:
      return sgd ? Scales(optimizer) : SlotFormat{};
    case Slot::kMaster:
      break;
  }
  return {};
}

}  // namespace orlop::server
