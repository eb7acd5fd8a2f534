// Vector forms of the 8-bit dynamic map: 256-element blocks to codes and back. quantize.h says what
// they compute, code_books.h has the formulas. Compiled once per instruction set.
#if defined(ORLOP_KERNELS_CODEC_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ORLOP_KERNELS_CODEC_INL_H_
#undef ORLOP_KERNELS_CODEC_INL_H_
#else
#define ORLOP_KERNELS_CODEC_INL_H_
#endif

#include <bit>
#include <limits>

#include "kernels/code_books.h"
#include "kernels/codec-avx512-inl.h"
#include "kernels/map-inl.h"
#include "kernels/quantize.h"
#include "kernels/random-inl.h"
#include "kernels/reference.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {
#if HWY_NATIVE_FMA

// ---- Bytes: four vectors of lanes at a time ----

// Stores lanes of -1 .. 255 as bytes; -1 as 0.
HWY_INLINE void StoreCodes(VI c0, VI c1, VI c2, VI c3, uint8_t* HWY_RESTRICT to) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  const __m512i bytes =
      _mm512_packus_epi16(_mm512_packs_epi32(c0.raw, c1.raw), _mm512_packs_epi32(c2.raw, c3.raw));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, bytes));
#elif HWY_TARGET == HWY_AVX2
  const __m256i bytes =
      _mm256_packus_epi16(_mm256_packs_epi32(c0.raw, c1.raw), _mm256_packs_epi32(c2.raw, c3.raw));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(bytes, order));
#else
  const size_t lanes = FloatLanes();
  hn::StoreU(hn::DemoteTo(DU8(), c0), DU8(), to);
  hn::StoreU(hn::DemoteTo(DU8(), c1), DU8(), to + lanes);
  hn::StoreU(hn::DemoteTo(DU8(), c2), DU8(), to + 2 * lanes);
  hn::StoreU(hn::DemoteTo(DU8(), c3), DU8(), to + 3 * lanes);
#endif
}

// The values of four vectors of codes.
template <CodeBook kBook>
HWY_INLINE void DecodeFour(const uint8_t* HWY_RESTRICT codes, VF absmax, VF* values) {
#if HWY_TARGET == HWY_AVX3_DL
  DecodeByPermutes(Map<kBook>::kPlanes, codes, values);
  ORLOP_UNROLL
  for (size_t j = 0; j < 4; ++j) values[j] = hn::Mul(values[j], absmax);
#else
  ORLOP_UNROLL
  for (size_t j = 0; j < 4; ++j) {
    values[j] = Map<kBook>::Decode(codes + j * FloatLanes(), absmax);
  }
#endif
}

template <CodeBook kBook>
HWY_INLINE void DecodeBlock(const uint8_t* HWY_RESTRICT codes, float absmax,
                            float* HWY_RESTRICT values) {
  const size_t lanes = FloatLanes();
  for (size_t i = 0; i < kQuantBlock; i += 4 * lanes) {
    VF four[4];
    DecodeFour<kBook>(codes + i, hn::Set(DF(), absmax), four);
    ORLOP_UNROLL
    for (size_t j = 0; j < 4; ++j) hn::StoreU(four[j], DF(), values + i + j * lanes);
  }
}

// Redoes exactly the lanes of a vector that are near a tie: their codes are right or one off.
template <CodeBook kBook, Rounding kRounding>
HWY_NOINLINE void FixTies(MF near_tie, const float* values, float absmax, uint8_t* codes) {
  uint8_t bits[8] = {};
  hn::StoreMaskBits(DF(), near_tie, bits);
  for (size_t i = 0; i < FloatLanes(); ++i) {
    if ((bits[i / 8] & (1 << (i % 8))) == 0) continue;
    codes[i] = reference::Encode(kBook, kRounding, values[i], absmax, 0);
  }
}

// Codes of vectors, rounded to nearest.
template <CodeBook kBook, Rounding kRounding>
class NearestEncoder {
 public:
  using M = Map<kBook>;
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  static constexpr bool kBySegments = kRounding == Rounding::kNoZero || !M::kIsSigned;
#else
  static constexpr bool kBySegments = false;
#endif
  explicit HWY_INLINE NearestEncoder(float inverse) : vector_(MakeVector(inverse)) {}
  HWY_INLINE VI Code(VF x, MF* near_tie) const {
    if constexpr (kBySegments) {
      return vector_.template Code<M::kIsSigned>(x, near_tie);
    } else {
      return M::template Nearest<kRounding>(x, vector_, near_tie);
    }
  }

 private:
  static HWY_INLINE auto MakeVector(float inverse) {
    if constexpr (kBySegments) {
      using namespace code_book_internal;
      return SegmentEncoder(M::kIsSigned                     ? kSignedSegments
                            : kRounding == Rounding::kNoZero ? kNoZeroSegments
                                                             : kUnsignedSegments,
                            inverse);
    } else {
      return hn::Set(DF(), inverse);
    }
  }
  decltype(MakeVector(1)) vector_;
};

// Codes of 256 codable values, whose absmax (not 0) is what they are scaled by.
template <CodeBook kBook, Rounding kRounding>
HWY_INLINE void EncodeScaled(const float* HWY_RESTRICT values, float absmax, BlockRandom random,
                             uint8_t* HWY_RESTRICT codes) {
  const DF df;
  using M = Map<kBook>;
  const VF inverse = hn::Set(df, 1 / absmax);
  const NearestEncoder<kBook, kRounding> encoder(1 / absmax);
  const size_t lanes = FloatLanes();
  for (size_t i = 0; i < kQuantBlock; i += 4 * lanes) {
    if constexpr (kRounding == Rounding::kStochastic) {
      const auto code = [&](size_t at) HWY_ATTR {
        return M::Stochastic(hn::LoadU(df, values + at), inverse, RandomUnits(random, at));
      };
      StoreCodes(code(i), code(i + lanes), code(i + 2 * lanes), code(i + 3 * lanes), codes + i);
    } else {
      MF t0, t1, t2, t3;
      const auto code = [&](size_t at, MF* near_tie)
                            HWY_ATTR { return encoder.Code(hn::LoadU(df, values + at), near_tie); };
      const VI c0 = code(i, &t0), c1 = code(i + lanes, &t1);
      const VI c2 = code(i + 2 * lanes, &t2), c3 = code(i + 3 * lanes, &t3);
      StoreCodes(c0, c1, c2, c3, codes + i);
      if (HWY_LIKELY(hn::AllFalse(df, hn::Or(hn::Or(t0, t1), hn::Or(t2, t3))))) continue;
      const MF ties[4] = {t0, t1, t2, t3};
      ORLOP_UNROLL
      for (size_t j = 0; j < 4; ++j) {
        if (hn::AllFalse(df, ties[j])) continue;
        FixTies<kBook, kRounding>(ties[j], values + i + j * lanes, absmax, codes + i + j * lanes);
      }
    }
  }
}

// A block about to be coded: what its values are scaled by, and by how much.
struct BlockScale {
  float absmax;    // of the codable values
  float before;    // the values are multiplied by it first
  bool is_number;  // false: some are not codable
  HWY_INLINE explicit BlockScale(uint32_t largest_bits)
      : absmax(std::bit_cast<float>(largest_bits)),
        before(quantize_internal::ScaleOf(absmax)),
        is_number(largest_bits < 0x7F800000u) {}
};

// Writes 256 codes and returns absmax. `largest_bits` as M::LargestBits of the values.
template <CodeBook kBook, Rounding kRounding>
HWY_INLINE float EncodeBlock(const float* HWY_RESTRICT values, uint32_t largest_bits,
                             BlockRandom random, uint8_t* HWY_RESTRICT codes) {
  using M = Map<kBook>;
  BlockScale scale(largest_bits);
  if (HWY_LIKELY(scale.is_number && scale.before == 1)) {
    EncodeScaled<kBook, kRounding>(values, scale.absmax, random, codes);
    return scale.absmax;
  }
  const DF df;
  HWY_ALIGN_MAX float changed[kQuantBlock];
  for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
    hn::Store(M::Codable(hn::LoadU(df, values + i)), df, changed + i);
  }
  scale = BlockScale(M::LargestBits(changed));
  if (scale.absmax == 0) {
    memset(codes, M::kIsSigned ? kSignedZeroCode : kUnsignedZeroCode, kQuantBlock);
    return 0;
  }
  for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
    const VF x = hn::Load(df, changed + i);
    const VF scaled = hn::Mul(x, hn::Set(df, scale.before));
    const VF least = hn::Set(df, std::numeric_limits<float>::denorm_min());  // x is not 0
    const auto lost = hn::And(hn::Eq(scaled, hn::Zero(df)), hn::Ne(x, hn::Zero(df)));
    hn::Store(hn::IfThenElse(lost, hn::CopySign(least, x), scaled), df, changed + i);
  }
  EncodeScaled<kBook, kRounding>(changed, scale.absmax * scale.before, random, codes);
  return scale.absmax;
}

template <CodeBook kBook>
HWY_INLINE float EncodeBlock(Rounding rounding, const float* values, uint32_t largest_bits,
                             BlockRandom random, uint8_t* codes) {
  switch (rounding) {
    case Rounding::kNoZero:
      return EncodeBlock<kBook, Rounding::kNoZero>(values, largest_bits, random, codes);
    case Rounding::kNearest:
      return EncodeBlock<kBook, Rounding::kNearest>(values, largest_bits, random, codes);
    case Rounding::kStochastic:
      return EncodeBlock<kBook, Rounding::kStochastic>(values, largest_bits, random, codes);
  }
  return 0;
}
template <CodeBook kBook>
HWY_INLINE float EncodeBlock(Rounding rounding, const float* values, BlockRandom random,
                             uint8_t* codes) {
  return EncodeBlock<kBook>(rounding, values, Map<kBook>::LargestBits(values), random, codes);
}

#endif  // HWY_NATIVE_FMA
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
