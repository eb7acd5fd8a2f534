#include "kernels/reduce.h"

#include <cmath>
#include <type_traits>  // IWYU pragma: keep (std::conditional_t, with vectors)

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/checks.h"
#include "kernels/reference.h"
#include "kernels/simd_targets.h"
#include "kernels/types.h"

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

// Number of fp64 vectors that hold the sixteen lanes of the stated order, and elements handled at a
// time.
constexpr size_t kLaneVectors = 16 / HWY_LANES(double);
constexpr size_t kSpan = HWY_LANES(float) < 8 ? 16 : 2 * HWY_LANES(float);
constexpr size_t kBytesAhead = 4096;  // bytes that are prefetched

// Loads two vectors: for bf16 the even and the odd elements, which needs fewer shuffles; for other
// types one after the other.
template <DType kType>
HWY_INLINE void LoadAndCopy(const uint8_t* from, uint8_t* to, VF* two) {
  if constexpr (kType == DType::kBF16) {
    const hn::Repartition<uint8_t, DF> bytes;
    const auto raw = hn::LoadU(bytes, from);
    if (to != nullptr) hn::StoreU(raw, bytes, to);
    const Pair pair = WidenPair(raw);
    two[0] = pair.even;
    two[1] = pair.odd;
  } else {
    using Bits = std::conditional_t<kType == DType::kF32, DF, DU16>;
    const hn::Repartition<uint8_t, Bits> bytes;
    ORLOP_UNROLL
    for (size_t k = 0; k < 2; ++k) {
      const auto raw = hn::LoadU(bytes, from + k * hn::Lanes(bytes));
      if (to != nullptr) hn::StoreU(raw, bytes, to + k * hn::Lanes(bytes));
      if constexpr (kType == DType::kF32) {
        two[k] = hn::BitCast(DF(), raw);
      } else {
        two[k] = FromF16(hn::BitCast(DU16(), raw));
      }
    }
  }
}

// Adds lane l + n / 2 to lane l of n, until one is left.
template <class D>
HWY_INLINE double SumHalves(D d, hn::Vec<D> v) {
  if constexpr (sizeof(v) > 2 * sizeof(double)) {
    const hn::Half<D> half;
    return SumHalves(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  } else {
    return hn::GetLane(v) + hn::ExtractLane(v, 1);
  }
}
template <size_t kVectors>
HWY_INLINE double SumVectors(VD* lane) {
  ORLOP_UNROLL
  for (size_t n = kVectors / 2; n > 0; n /= 2) {
    ORLOP_UNROLL
    for (size_t v = 0; v < n; ++v) lane[v] = hn::Add(lane[v], lane[v + n]);
  }
  return SumHalves(DD(), lane[0]);
}

// Returns the sum of squares of one whole block, and copies the block if `to` is not null. The sum
// is finite if and only if every element is, because squares of fp32 cannot overflow fp64.
template <DType kType>
HWY_INLINE double SumSquares(const uint8_t* from, uint8_t* to) {
  const DD dd;
  // Even and odd lanes are kept apart: halves of their sixteen are halves of their eight.
  constexpr bool kInPairs = kType == DType::kBF16;
  constexpr size_t kVectors = kInPairs ? kLaneVectors / 2 : kLaneVectors;
  VD lanes[2][kVectors];
  ORLOP_UNROLL
  for (size_t v = 0; v < kVectors; ++v) lanes[0][v] = lanes[1][v] = hn::Zero(dd);
  Prefetch(from + kBytesAhead, kQuantBlock * SizeOf(kType));
  for (size_t i = 0; i < kQuantBlock; i += kSpan) {
    ORLOP_UNROLL
    for (size_t j = 0; j < kSpan; j += PairLanes()) {
      const size_t at = (i + j) * SizeOf(kType);
      VF two[2];
      LoadAndCopy<kType>(from + at, to == nullptr ? nullptr : to + at, two);
      ORLOP_UNROLL
      for (size_t k = 0; k < 2; ++k) {
        const VD low = hn::PromoteTo(dd, hn::LowerHalf(two[k]));
        const VD high = hn::PromoteTo(dd, hn::UpperHalf(hn::Half<DF>(), two[k]));
        VD* const lane = lanes[kInPairs ? k : 0];
        const size_t first = kInPairs ? j / PairLanes() : j / FloatLanes() + k;
        VD& low_lane = lane[2 * first % kVectors];
        low_lane = hn::MulAdd(low, low, low_lane);
        VD& high_lane = lane[(2 * first + 1) % kVectors];
        high_lane = hn::MulAdd(high, high, high_lane);
      }
    }
  }
  const double sum = SumVectors<kVectors>(lanes[0]);
  return kInPairs ? sum + SumVectors<kVectors>(lanes[1]) : sum;
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
    } else {  // rare: the whole step is skipped
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
