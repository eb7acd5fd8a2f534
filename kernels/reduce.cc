#include "kernels/reduce.h"

#include <cmath>
#include <type_traits>

#include "kernels/checks.h"
#include "kernels/reference.h"
#include "kernels/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/reduce.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {
#if HWY_NATIVE_FMA

using DD = hn::ScalableTag<double>;
using VD = hn::Vec<DD>;

// Vectors of fp64 that hold the sixteen lanes of the stated order, and of fp32 that fill them.
constexpr size_t kLaneVectors = 16 / HWY_LANES(double);
constexpr size_t kLoads = 16 / HWY_LANES(float);

template <DType kType>
HWY_INLINE VF LoadAndCopy(const uint8_t* from, uint8_t* to) {
  using Bits = std::conditional_t<kType == DType::kF32, DF, DU16>;
  const hn::Repartition<uint8_t, Bits> bytes;
  const auto raw = hn::LoadU(bytes, from);
  if (to != nullptr) hn::StoreU(raw, bytes, to);
  const auto bits = hn::BitCast(Bits(), raw);
  if constexpr (kType == DType::kF32) {
    return bits;
  } else {
    return kType == DType::kBF16 ? FromBF16(bits) : FromF16(bits);
  }
}

// Sum of squares of one whole block, copied on the way where `to` is not null. Not finite if and
// only if some element is not: squares of fp32 cannot overflow fp64.
template <DType kType>
HWY_INLINE double SumSquares(const uint8_t* from, uint8_t* to) {
  const DD dd;
  VD lane[kLaneVectors];
  for (VD& v : lane) v = hn::Zero(dd);
  for (size_t i = 0; i < kQuantBlock; i += 16) {
    for (size_t load = 0; load < kLoads; ++load) {
      const size_t at = (i + load * HWY_LANES(float)) * SizeOf(kType);
      const VF x = LoadAndCopy<kType>(from + at, to == nullptr ? nullptr : to + at);
      const VD low = hn::PromoteTo(dd, hn::LowerHalf(x));
      const VD high = hn::PromoteTo(dd, hn::UpperHalf(hn::Half<DF>(), x));
      lane[2 * load] = hn::MulAdd(low, low, lane[2 * load]);
      lane[2 * load + 1] = hn::MulAdd(high, high, lane[2 * load + 1]);
    }
  }
  HWY_ALIGN_MAX double sums[16];
  for (size_t v = 0; v < kLaneVectors; ++v) {
    hn::Store(lane[v], dd, sums + v * HWY_LANES(double));
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  return sums[0];
}

template <DType kType>
HWY_INLINE void Reduce(uint8_t* to, TypedSpan gradient, BlockSums* sums) {
  for (size_t begin = 0; begin < gradient.count; begin += kQuantBlock) {
    const TypedSpan block = Slice(gradient, begin, kQuantBlock);
    const size_t bytes = block.count * SizeOf(kType);
    const uint8_t* from = static_cast<const uint8_t*>(block.data);
    double sum_squares;
    if (HWY_LIKELY(block.count == kQuantBlock)) {
      sum_squares = SumSquares<kType>(from, to);
    } else {
      HWY_ALIGN_MAX uint8_t padded[kQuantBlock * sizeof(float)] = {};
      memcpy(padded, from, bytes);
      if (to != nullptr) memcpy(to, padded, bytes);
      sum_squares = SumSquares<kType>(padded, nullptr);
    }
    if (HWY_LIKELY(std::isfinite(sum_squares))) {
      sums->sum_squares += sum_squares;
    } else {  // rare: the whole step will be skipped
      const BlockSums counted =
          reference::ReduceBlock({kType, to == nullptr ? from : to, block.count});
      sums->sum_squares += counted.sum_squares;
      sums->nonfinite_count += counted.nonfinite_count;
    }
    if (to != nullptr) to += bytes;
  }
}

void CopyAndReduce(void* destination, TypedSpan gradient, BlockSums* sums) {
  uint8_t* to = static_cast<uint8_t*>(destination);
  switch (gradient.dtype) {
    case DType::kF32:
      return Reduce<DType::kF32>(to, gradient, sums);
    case DType::kBF16:
      return Reduce<DType::kBF16>(to, gradient, sums);
    case DType::kF16:
      return Reduce<DType::kF16>(to, gradient, sums);
  }
}

void ReduceGradient(TypedSpan gradient, BlockSums* sums) {
  HWY_NAMESPACE::CopyAndReduce(nullptr, gradient, sums);
}

template <DType kType>
HWY_INLINE void Accumulate(TypedSpan contribution, absl::Span<float> accumulator) {
  const DF df;
  const uint8_t* from = static_cast<const uint8_t*>(contribution.data);
  float* to = accumulator.data();
  const size_t lanes = FloatLanes();
  size_t i = 0;
  for (; i + lanes <= contribution.count; i += lanes) {
    const VF sum = hn::Add(hn::LoadU(df, to + i), LoadTyped<kType>(from + i * SizeOf(kType)));
    hn::StoreU(CanonicalIfNaN(sum), df, to + i);
  }
  reference::AccumulateToF32(Slice(contribution, i, lanes), accumulator.subspan(i));
}

void AccumulateToF32(TypedSpan contribution, absl::Span<float> accumulator) {
  switch (contribution.dtype) {
    case DType::kF32:
      return Accumulate<DType::kF32>(contribution, accumulator);
    case DType::kBF16:
      return Accumulate<DType::kBF16>(contribution, accumulator);
    case DType::kF16:
      return Accumulate<DType::kF16>(contribution, accumulator);
  }
}

#else
using reference::AccumulateToF32;
using reference::CopyAndReduce;
using reference::ReduceGradient;
#endif  // HWY_NATIVE_FMA
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace orlop::kernels {

HWY_EXPORT(CopyAndReduce);
HWY_EXPORT(ReduceGradient);
HWY_EXPORT(AccumulateToF32);

void ReduceGradient(TypedSpan gradient, BlockSums* sums) {
  HWY_DYNAMIC_DISPATCH(ReduceGradient)(gradient, sums);
}

void CopyAndReduce(void* destination, TypedSpan gradient, BlockSums* sums) {
  HWY_DYNAMIC_DISPATCH(CopyAndReduce)(destination, gradient, sums);
}

absl::Status AccumulateToF32(TypedSpan contribution, absl::Span<float> accumulator) {
  absl::Status status = CheckCounts(contribution.count, {{"accumulator", accumulator.size()}});
  if (status.ok()) HWY_DYNAMIC_DISPATCH(AccumulateToF32)(contribution, accumulator);
  return status;
}

}  // namespace orlop::kernels
#endif  // HWY_ONCE
