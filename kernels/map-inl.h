// Vector forms of the 8-bit dynamic map, one vector of fp32 lanes at a time. quantize.h defines
// what they compute; code_books.h has the formulas. Compiled once per instruction set.
#if defined(ORLOP_KERNELS_MAP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ORLOP_KERNELS_MAP_INL_H_
#undef ORLOP_KERNELS_MAP_INL_H_
#else
#define ORLOP_KERNELS_MAP_INL_H_
#endif

#include <limits>

#include "kernels/code_books.h"
#include "kernels/quantize.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {
#if HWY_NATIVE_FMA

// Returns table entries chosen per lane by the low three bits of `slot`. The table repeats its
// eight entries for 16 lanes.
HWY_INLINE VF Lookup8(const std::array<float, 16>& table, VI slot) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  return VF{_mm512_permutexvar_ps(slot.raw, _mm512_load_ps(table.data()))};
#elif HWY_TARGET == HWY_AVX2
  return VF{_mm256_permutevar8x32_ps(_mm256_load_ps(table.data()), slot.raw)};
#else
  return hn::GatherIndex(DF(), table.data(), hn::And(slot, hn::Set(DI(), 7)));
#endif
}

// Truncates, or rounds to nearest, ties to even. The value must fit: Highway's own conversions
// spend instructions on values that do not.
HWY_INLINE VI ToInt(VF v) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  return VI{_mm512_cvttps_epi32(v.raw)};
#elif HWY_TARGET == HWY_AVX2
  return VI{_mm256_cvttps_epi32(v.raw)};
#else
  return hn::ConvertTo(DI(), v);
#endif
}
HWY_INLINE VI ToNearestInt(VF v) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  return VI{_mm512_cvtps_epi32(v.raw)};
#elif HWY_TARGET == HWY_AVX2
  return VI{_mm256_cvtps_epi32(v.raw)};
#else
  return hn::NearestInt(v);
#endif
}

template <CodeBook kBook>
struct Map {
  static constexpr bool kIsSigned = kBook == CodeBook::kSigned;
  static constexpr const code_book_internal::SlotTables& kSlots =
      kIsSigned ? code_book_internal::kSignedSlots : code_book_internal::kUnsignedSlots;
  static constexpr const code_book_internal::DecadeTables& kDecadeTables =
      kIsSigned ? code_book_internal::kSignedDecades : code_book_internal::kUnsignedDecades;
  static constexpr const code_book_internal::StochasticTables& kStochasticTables =
      kIsSigned ? code_book_internal::kSignedStochastic : code_book_internal::kUnsignedStochastic;
  static constexpr float kSmallest =
      kIsSigned ? code_book_internal::kSignedSmallest : code_book_internal::kUnsignedSmallest;
  static constexpr float kZeroK = kIsSigned ? 0 : 1;  // number k of the entry 0

  // Returns numerator / denominator, correctly rounded for every entry of the book (a test compares
  // all): one Newton step on the product with the reciprocal.
  static HWY_INLINE VF Quotient(VF numerator, VF denominator, VF reciprocal) {
    const VF estimate = hn::Mul(numerator, reciprocal);
    const VF error = hn::NegMulAdd(estimate, denominator, numerator);
    return hn::MulAdd(error, reciprocal, estimate);
  }

  static HWY_INLINE VF Decode(VI code, VF absmax) {
    const DF df;
    const DI di;
    const VI offset_code =
        kIsSigned ? hn::Sub(code, hn::Set(di, kSignedZeroCode)) : hn::Add(code, hn::Set(di, 1));
    const VF k = hn::ConvertTo(df, kIsSigned ? hn::Abs(offset_code) : offset_code);
    const VI slot = hn::ShiftRight<23>(hn::BitCast(di, k));
    const VF numerator = hn::MulAdd(hn::Set(df, 18.0f), k, Lookup8(kSlots.offset, slot));
    VF value =
        Quotient(numerator, Lookup8(kSlots.denominator, slot), Lookup8(kSlots.reciprocal, slot));
    if constexpr (kIsSigned) {
      value = hn::IfThenElseZero(hn::Ne(k, hn::Zero(df)), value);
      value = hn::CopySignToAbs(value, hn::BitCast(df, offset_code));
    }
    return hn::Mul(value, absmax);
  }

  // Returns the value that is coded for x: 0 for NaN, +-FLT_MAX for infinities, +0 for unsigned
  // negatives.
  static HWY_INLINE VF Codable(VF x) {
    const DF df;
    const VF largest = hn::Set(df, hwy::HighestValue<float>());
    const VF number = hn::IfThenElse(hn::IsNaN(x), hn::Zero(df), x);
    if (kIsSigned) return hn::Min(hn::Max(number, hn::Neg(largest)), largest);
    return hn::Abs(hn::Min(hn::Max(number, hn::Zero(df)), largest));
  }

  // Returns the decade whose range holds the magnitude a (0..1), given where each begins. 7 is 1.0;
  // 0 includes everything below the first.
  static HWY_INLINE VI DecadeOf(VF a, const std::array<float, 16>& begin) {
    const DF df;
    const DI di;
    // As an integer, the bits of a positive float are 2^23 (127 + log2 a) less at most 0.0861 *
    // 2^23. So this guess is the decade or the one above it.
    const VF bits = hn::ConvertTo(df, hn::BitCast(di, a));
    constexpr float kLog10Of2 = 0.30103f;
    const VF guess =
        hn::MulAdd(bits, hn::Set(df, kLog10Of2 / (1 << 23)), hn::Set(df, 7.03f - 127 * kLog10Of2));
    const VI decade = ToInt(hn::Max(guess, hn::Zero(df)));
    const MF below = hn::Lt(a, Lookup8(begin, decade));
    return hn::Add(decade, hn::BitCast(di, hn::VecFromMask(df, below)));
  }

  // Returns k before rounding for a magnitude a (0..1), which must not be 0 in the unsigned book.
  // The error is less than 5e-5: a few fp32 roundings at 256 or less, and those of the two entries.
  template <Rounding kRounding>
  static HWY_INLINE VF Position(VF a) {
    const DF df;
    const VI decade = DecadeOf(a, kDecadeTables.lower_bound);
    const VF position =
        hn::MulAdd(a, Lookup8(kDecadeTables.scale, decade), Lookup8(kDecadeTables.bias, decade));
    const VF within = hn::Min(position, Lookup8(kDecadeTables.last, decade));
    const MF is_coded = hn::Ge(a, hn::Set(df, kSmallest));
    if constexpr (kIsSigned) return hn::IfThenElseZero(is_coded, within);
    if constexpr (kRounding == Rounding::kNoZero) return hn::Max(within, hn::Set(df, 2));
    return hn::IfThenElse(is_coded, within, hn::Set(df, 1));
  }

  // Returns k of x, with its sign, rounded up or down by `unit` (0..1).
  static HWY_INLINE VI Stochastic(VF x, VF inverse, VF unit) {
    const DF df;
    const VF r = hn::Mul(x, inverse);
    const VF a = hn::Abs(r);
    const VI decade = DecadeOf(a, kStochasticTables.first_value);
    const VF last = Lookup8(kDecadeTables.last, decade);
    VF p = hn::MulAdd(a, Lookup8(kDecadeTables.scale, decade), Lookup8(kDecadeTables.bias, decade));
    const VF beyond = hn::MulAdd(hn::Sub(p, last), Lookup8(kStochasticTables.beyond, decade), last);
    p = hn::IfThenElse(hn::Gt(p, last), hn::Min(beyond, hn::Add(last, hn::Set(df, 1))), p);
    const VF below =
        hn::MulAdd(a, hn::Set(df, kStochasticTables.inverse_smallest), hn::Set(df, kZeroK));
    p = hn::IfThenElse(hn::Lt(a, hn::Set(df, kSmallestValue)), below, p);
    VF k = hn::Floor(hn::Add(p, unit));
    if (!kIsSigned) {
      k = hn::IfThenElse(hn::Eq(x, hn::Zero(df)), hn::Set(df, kZeroK), hn::Max(k, hn::Set(df, 2)));
    }
    return ToInt(kIsSigned ? hn::CopySignToAbs(k, r) : k);
  }
  static constexpr float kSmallestValue =
      kIsSigned ? kSignedCodeBook[kSignedZeroCode + 1] : kUnsignedCodeBook[1];

  // Returns the larger of `largest` and the magnitude of x, as bits. 0x7F800000 or more: x is not
  // codable.
  static HWY_INLINE hn::Vec<DU> Larger(hn::Vec<DU> largest, VF x) {
    return hn::Max(largest, hn::BitCast(DU(), kIsSigned ? hn::Abs(x) : x));
  }
  static HWY_INLINE uint32_t LargestBits(const float* HWY_RESTRICT values) {
    auto largest = hn::Zero(DU());
    for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
      largest = Larger(largest, hn::LoadU(DF(), values + i));
    }
    return hn::GetLane(hn::MaxOfLanes(DU(), largest));
  }
};

#endif  // HWY_NATIVE_FMA
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
