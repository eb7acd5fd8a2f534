#include "kernels/casts.h"

#include <bit>
#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/arithmetic.h"
#include "kernels/checks.h"
#include "kernels/reference.h"
#include "kernels/simd_targets.h"
#include "kernels/types.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/casts.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {
#if HWY_NATIVE_FMA

void WidenToF32(TypedSpan source, absl::Span<float> destination) {
  for (size_t begin = 0; begin < source.count; begin += kQuantBlock) {
    const size_t count = HWY_MIN(kQuantBlock, source.count - begin);
    if (count == kQuantBlock) {
      WidenPaddedBlock(source, begin, destination.data() + begin);
    } else {
      PaddedBlock<float> tail(0);
      WidenPaddedBlock(source, begin, tail.get());
      tail.CopyTo(destination.data() + begin, count);
    }
  }
}

template <bool kBF16>
HWY_INLINE void RoundTo16(const float* source, size_t count, uint16_t* destination) {
  const size_t lanes = FloatLanes();
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const VF v = hn::LoadU(DF(), source + i);
    hn::StoreU(kBF16 ? ToBF16(v) : ToF16(v), DU16(), destination + i);
  }
  for (; i < count; ++i) {
    destination[i] = kBF16 ? reference::F32ToBF16(source[i]) : reference::F32ToF16(source[i]);
  }
}

void RoundToBF16(absl::Span<const float> source, absl::Span<uint16_t> destination) {
  RoundTo16<true>(source.data(), source.size(), destination.data());
}

void RoundToF16(absl::Span<const float> source, absl::Span<uint16_t> destination) {
  RoundTo16<false>(source.data(), source.size(), destination.data());
}

void SplitMaster(absl::Span<const float> master, absl::Span<uint16_t> weight,
                 absl::Span<int16_t> remainder) {
  const size_t lanes = FloatLanes();
  size_t i = 0;
  for (; i + lanes <= master.size(); i += lanes) {
    SplitLanes(hn::LoadU(DF(), master.data() + i), weight.data() + i, remainder.data() + i);
  }
  reference::SplitMaster(master.subspan(i), weight.subspan(i), remainder.subspan(i));
}

void JoinMaster(absl::Span<const uint16_t> weight, absl::Span<const int16_t> remainder,
                absl::Span<float> master) {
  const size_t lanes = FloatLanes();
  size_t i = 0;
  for (; i + lanes <= weight.size(); i += lanes) {
    hn::StoreU(JoinLanes(weight.data() + i, remainder.data() + i), DF(), master.data() + i);
  }
  reference::JoinMaster(weight.subspan(i), remainder.subspan(i), master.subspan(i));
}

void JoinMasterToF16(absl::Span<const uint16_t> weight, absl::Span<const int16_t> remainder,
                     absl::Span<uint16_t> destination, F16Overflow* overflow) {
  const DF df;
  const size_t lanes = FloatLanes();
  *overflow = {};
  size_t i = 0;
  for (; i + lanes <= weight.size(); i += lanes) {
    const VF master = JoinLanes(weight.data() + i, remainder.data() + i);
    hn::StoreU(ToF16(master), DU16(), destination.data() + i);
    const MF beyond = hn::Gt(hn::Abs(master), hn::Set(df, kLargestF16));
    if (HWY_LIKELY(hn::AllFalse(df, beyond))) continue;
    if (overflow->count == 0) overflow->first_index = i + hn::FindFirstTrue(df, beyond);
    overflow->count += hn::CountTrue(df, beyond);
  }
  F16Overflow tail;
  reference::JoinMasterToF16(weight.subspan(i), remainder.subspan(i), destination.subspan(i),
                             &tail);
  if (overflow->count == 0) overflow->first_index = i + tail.first_index;
  overflow->count += tail.count;
}

#else
using reference::JoinMaster;
using reference::JoinMasterToF16;
using reference::RoundToBF16;
using reference::RoundToF16;
using reference::SplitMaster;
using reference::WidenToF32;
#endif  // HWY_NATIVE_FMA
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace orlop::kernels {

HWY_EXPORT(WidenToF32);
HWY_EXPORT(RoundToBF16);
HWY_EXPORT(RoundToF16);
HWY_EXPORT(SplitMaster);
HWY_EXPORT(JoinMaster);
HWY_EXPORT(JoinMasterToF16);

absl::Status WidenToF32(TypedSpan source, absl::Span<float> destination) {
  absl::Status status = CheckCounts(source.count, {{"destination", destination.size()}});
  if (status.ok()) HWY_DYNAMIC_DISPATCH(WidenToF32)(source, destination);
  return status;
}

absl::Status RoundToBF16(absl::Span<const float> source, absl::Span<uint16_t> destination) {
  absl::Status status = CheckCounts(source.size(), {{"destination", destination.size()}});
  if (status.ok()) HWY_DYNAMIC_DISPATCH(RoundToBF16)(source, destination);
  return status;
}

absl::Status RoundToF16(absl::Span<const float> source, absl::Span<uint16_t> destination) {
  absl::Status status = CheckCounts(source.size(), {{"destination", destination.size()}});
  if (status.ok()) HWY_DYNAMIC_DISPATCH(RoundToF16)(source, destination);
  return status;
}

absl::Status SplitMaster(absl::Span<const float> master, absl::Span<uint16_t> weight,
                         absl::Span<int16_t> remainder) {
  absl::Status status =
      CheckCounts(master.size(), {{"weight", weight.size()}, {"remainder", remainder.size()}});
  if (status.ok()) HWY_DYNAMIC_DISPATCH(SplitMaster)(master, weight, remainder);
  return status;
}

absl::Status JoinMaster(absl::Span<const uint16_t> weight, absl::Span<const int16_t> remainder,
                        absl::Span<float> master) {
  absl::Status status =
      CheckCounts(weight.size(), {{"remainder", remainder.size()}, {"master", master.size()}});
  if (status.ok()) HWY_DYNAMIC_DISPATCH(JoinMaster)(weight, remainder, master);
  return status;
}

absl::Status JoinMasterToF16(absl::Span<const uint16_t> weight, absl::Span<const int16_t> remainder,
                             absl::Span<uint16_t> destination, F16Overflow* overflow) {
  absl::Status status = CheckCounts(
      weight.size(), {{"remainder", remainder.size()}, {"destination", destination.size()}});
  if (status.ok()) {
    HWY_DYNAMIC_DISPATCH(JoinMasterToF16)(weight, remainder, destination, overflow);
  }
  return status;
}

absl::Status SplitMaster24(absl::Span<const float> master, absl::Span<uint16_t> weight,
                           absl::Span<int8_t> remainder) {
  absl::Status status =
      CheckCounts(master.size(), {{"weight", weight.size()}, {"remainder", remainder.size()}});
  for (size_t i = 0; i < master.size() && status.ok(); ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(Canonical(master[i]));
    const uint32_t kept = (bits + 0x80) >> 8;
    weight[i] = static_cast<uint16_t>((kept + 0x80) >> 8);
    remainder[i] = static_cast<int8_t>(kept);
  }
  return status;
}

absl::Status RoundToBF16Away(absl::Span<const float> master, absl::Span<uint16_t> weight) {
  absl::Status status = CheckCounts(master.size(), {{"weight", weight.size()}});
  for (size_t i = 0; i < master.size() && status.ok(); ++i) {
    weight[i] = reference::Split(master[i]).weight;
  }
  return status;
}

}  // namespace orlop::kernels
#endif  // HWY_ONCE
