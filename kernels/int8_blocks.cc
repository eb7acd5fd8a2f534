#include "kernels/int8_blocks.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/checks.h"
#include "kernels/reference.h"
#include "kernels/simd_targets.h"
#include "kernels/types.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/int8_blocks.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {
#if HWY_NATIVE_FMA

using DI8 = hn::Rebind<int8_t, DF>;
using VU = hn::Vec<DU>;

HWY_INLINE VU16 DecodeLanes(const int8_t* codes, VF scale) {
  const VF code = hn::ConvertTo(DF(), hn::PromoteTo(DI(), hn::LoadU(DI8(), codes)));
  return ToBF16(hn::Mul(code, scale));
}

// Returns the scale of a whole block.
HWY_INLINE float ScaleOf(const float* HWY_RESTRICT values) {
  const DU du;
  // Magnitudes are ordered as their bits are, infinity and NaN last.
  VU largest = hn::Zero(du);
  for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
    const VF magnitude = hn::Abs(hn::Load(DF(), values + i));
    largest = hn::Max(largest, hn::BitCast(du, magnitude));
  }
  const uint32_t bits = hn::GetLane(hn::MaxOfLanes(du, largest));
  float absmax;
  memcpy(&absmax, &bits, sizeof absmax);
  return bits < 0x7F800000u ? absmax / 127 : CanonicalNaN();
}

HWY_INLINE void CodeBlock(const float* HWY_RESTRICT values, float scale, int8_t* codes) {
  const DF df;
  if (!(scale > 0)) {
    memset(codes, 0, kQuantBlock);
    return;
  }
  const VF divisor = hn::Set(df, scale), limit = hn::Set(df, 127);
  for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
    const VF quotient = hn::Div(hn::Load(df, values + i), divisor);
    const VF clamped = hn::Max(hn::Neg(limit), hn::Min(limit, quotient));
    hn::StoreU(hn::DemoteTo(DI8(), hn::NearestInt(clamped)), DI8(), codes + i);
  }
}

// Encodes a whole block; replaces `values` by x (int8_blocks.h, Feedback). `residual` and `next`
// may both be null.
HWY_INLINE void EncodeBlock(float* HWY_RESTRICT values, float loss_scale, const uint16_t* residual,
                            uint16_t* next, uint8_t* wire) {
  const DF df;
  if (residual != nullptr) {
    const VF factor = hn::Set(df, loss_scale);
    for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
      const VF kept = FromBF16(hn::LoadU(DU16(), residual + i));
      hn::Store(hn::MulAdd(kept, factor, hn::Load(df, values + i)), df, values + i);
    }
  }
  const float scale = ScaleOf(values);
  memcpy(wire, &scale, sizeof scale);
  int8_t* const codes = reinterpret_cast<int8_t*>(wire + sizeof scale);
  CodeBlock(values, scale, codes);
  if (residual == nullptr) return;
  const VF factor = hn::Set(df, scale), inverse = hn::Set(df, 1 / loss_scale);
  for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
    const VF lost = hn::Sub(hn::Load(df, values + i), FromBF16(DecodeLanes(codes + i, factor)));
    hn::StoreU(ToBF16(hn::Mul(lost, inverse)), DU16(), next + i);
  }
}

void EncodeInt8(TypedSpan source, const ErrorFeedback* feedback, absl::Span<uint8_t> wire) {
  HWY_ALIGN_MAX float values[kQuantBlock];
  const float loss_scale = feedback != nullptr ? feedback->loss_scale : 1;
  const uint16_t* residual = feedback != nullptr ? feedback->residual.data() : nullptr;
  uint16_t* next = feedback != nullptr ? feedback->next.data() : nullptr;
  uint8_t* to = wire.data();
  size_t begin = 0;
  for (; begin + kQuantBlock <= source.count; begin += kQuantBlock, to += kInt8BlockBytes) {
    WidenPaddedBlock(source, begin, values);
    EncodeBlock(values, loss_scale, residual, next, to);
    if (feedback == nullptr) continue;
    residual += kQuantBlock;
    next += kQuantBlock;
  }
  const size_t count = source.count - begin;
  if (count == 0) return;
  WidenPaddedBlock(source, begin, values);
  uint8_t tail[kInt8BlockBytes];
  if (feedback == nullptr) {
    EncodeBlock(values, loss_scale, nullptr, nullptr, tail);
  } else {
    const PaddedBlock<uint16_t> padded(residual, count, 0);
    PaddedBlock<uint16_t> next_tail(0);
    EncodeBlock(values, loss_scale, padded.get(), next_tail.get(), tail);
    next_tail.CopyTo(next, count);
  }
  memcpy(to, tail, sizeof(float) + count);
}

HWY_INLINE void DecodeBlock(float scale, const int8_t* codes, uint16_t* values) {
  const VF factor = hn::Set(DF(), std::isfinite(scale) ? scale : CanonicalNaN());
  for (size_t i = 0; i < kQuantBlock; i += FloatLanes())
    hn::StoreU(DecodeLanes(codes + i, factor), DU16(), values + i);
}

void DecodeInt8(absl::Span<const uint8_t> wire, absl::Span<uint16_t> values) {
  const uint8_t* from = wire.data();
  for (size_t begin = 0; begin < values.size(); begin += kQuantBlock, from += kInt8BlockBytes) {
    float scale;
    memcpy(&scale, from, sizeof scale);
    const int8_t* codes = reinterpret_cast<const int8_t*>(from + sizeof scale);
    const size_t count = HWY_MIN(kQuantBlock, values.size() - begin);
    if (count == kQuantBlock) {
      DecodeBlock(scale, codes, values.data() + begin);
    } else {
      PaddedBlock<int8_t> padded(codes, count, 0);
      PaddedBlock<uint16_t> tail(0);
      DecodeBlock(scale, padded.get(), tail.get());
      tail.CopyTo(values.data() + begin, count);
    }
  }
}

#else
using reference::DecodeInt8;
using reference::EncodeInt8;
#endif  // HWY_NATIVE_FMA
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace orlop::kernels {

HWY_EXPORT(EncodeInt8);
HWY_EXPORT(DecodeInt8);

absl::Status EncodeInt8(TypedSpan source, const ErrorFeedback* feedback, absl::Span<uint8_t> wire) {
  absl::Status status = CheckCounts(Int8Bytes(source.count), {{"wire", wire.size()}});
  if (feedback != nullptr)
    status.Update(CheckCounts(
        source.count, {{"residual", feedback->residual.size()}, {"next", feedback->next.size()}}));
  if (status.ok()) HWY_DYNAMIC_DISPATCH(EncodeInt8)(source, feedback, wire);
  return status;
}

absl::Status DecodeInt8(absl::Span<const uint8_t> wire, absl::Span<uint16_t> values) {
  absl::Status status = CheckCounts(Int8Bytes(values.size()), {{"wire", wire.size()}});
  if (!status.ok()) return status;
  for (size_t block = 0; block < BlockCount(values.size()); ++block) {
    float scale;
    std::memcpy(&scale, wire.data() + block * kInt8BlockBytes, sizeof scale);
    if (std::signbit(scale) && !std::isnan(scale))
      return absl::InvalidArgumentError(
          absl::StrCat("the scale of block ", block, " is ", scale, "; at least +0"));
  }
  HWY_DYNAMIC_DISPATCH(DecodeInt8)(wire, values);
  return absl::OkStatus();
}

}  // namespace orlop::kernels
#endif  // HWY_ONCE
