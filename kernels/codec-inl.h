// Vector forms of the 8-bit dynamic map: encode and decode 256-element blocks. quantize.h defines
// what they compute; code_books.h has the formulas. Compiled once per instruction set.
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

// ---- Two pairs (simd-inl.h) at a time: four vectors, even, odd, even, odd ----

HWY_INLINE size_t FourLanes() { return 4 * FloatLanes(); }

HWY_INLINE void LoadFour(const float* HWY_RESTRICT values, VF* four) {
  ORLOP_UNROLL
  for (size_t j = 0; j < 4; j += 2) {
    const Pair pair = LoadPair(values + j * FloatLanes());
    four[j] = pair.even;
    four[j + 1] = pair.odd;
  }
}
HWY_INLINE void StoreFour(const VF* four, float* HWY_RESTRICT values) {
  ORLOP_UNROLL
  for (size_t j = 0; j < 4; j += 2) StorePair({four[j], four[j + 1]}, values + j * FloatLanes());
}

// Stores the codes of numbers k (code_books.h), which have a sign in the signed book. Saturation
// limits numbers beyond the codes: -128 gives code 0, as does 0 in the unsigned book, and a number
// that stochastic rounding raised above 1.0 gives 255.
template <CodeBook kBook>
HWY_INLINE void StoreNumbers(const VI* k, uint8_t* HWY_RESTRICT to) {
  constexpr int16_t kOffset = kBook == CodeBook::kSigned ? kSignedZeroCode : -1;
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  const __m512i offset = _mm512_set1_epi16(kOffset);
  const __m512i bytes =
      _mm512_packus_epi16(_mm512_add_epi16(_mm512_packs_epi32(k[0].raw, k[1].raw), offset),
                          _mm512_add_epi16(_mm512_packs_epi32(k[2].raw, k[3].raw), offset));
#if HWY_TARGET == HWY_AVX3_DL
  const __m512i order = _mm512_load_si512(kVectorsToBytes.data());
  _mm512_storeu_si512(to, _mm512_permutexvar_epi8(order, bytes));
#else
  const __m128i mix = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  const __m512i mixed = _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(mix));
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi64(order, mixed));
#endif
#elif HWY_TARGET == HWY_AVX2
  const __m256i offset = _mm256_set1_epi16(kOffset);
  const __m256i bytes =
      _mm256_packus_epi16(_mm256_add_epi16(_mm256_packs_epi32(k[0].raw, k[1].raw), offset),
                          _mm256_add_epi16(_mm256_packs_epi32(k[2].raw, k[3].raw), offset));
  const __m128i mix = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  const __m256i mixed = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(mix));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(mixed, 0xD8));
#else
  const DI di;
  ORLOP_UNROLL
  for (size_t j = 0; j < 4; j += 2) {
    const auto code = [&](VI number) HWY_ATTR {
      const VI unbounded = hn::Add(number, hn::Set(di, kOffset));
      return hn::Min(hn::Max(unbounded, hn::Zero(di)), hn::Set(di, 255));
    };
    const VI both = hn::Or(code(k[j]), hn::ShiftLeft<8>(code(k[j + 1])));
    const hn::Repartition<uint8_t, DU16> bytes;
    hn::StoreU(hn::BitCast(bytes, hn::DemoteTo(DU16(), both)), bytes, to + j * FloatLanes());
  }
#endif
}

// Decodes codes to values.
template <CodeBook kBook>
HWY_INLINE void DecodeFour(const uint8_t* HWY_RESTRICT codes, VF absmax, VF* values) {
#if HWY_TARGET == HWY_AVX3_DL
  DecodeByPermutes<kBook>(codes, values);
  ORLOP_UNROLL
  for (size_t j = 0; j < 4; ++j) values[j] = hn::Mul(values[j], absmax);
#else
  const DI di;
  ORLOP_UNROLL
  for (size_t j = 0; j < 4; j += 2) {
    const VI both = hn::BitCast(di, hn::PromoteTo(DU(), LoadBits16(codes + j * FloatLanes())));
    values[j] = Map<kBook>::Decode(hn::And(both, hn::Set(di, 255)), absmax);
    values[j + 1] = Map<kBook>::Decode(hn::ShiftRight<8>(both), absmax);
  }
#endif
}

template <CodeBook kBook>
HWY_INLINE void DecodeBlock(const uint8_t* HWY_RESTRICT codes, float absmax,
                            float* HWY_RESTRICT values) {
  for (size_t i = 0; i < kQuantBlock; i += FourLanes()) {
    VF four[4];
    DecodeFour<kBook>(codes + i, hn::Set(DF(), absmax), four);
    StoreFour(four, values + i);
  }
}

// ---- Rounding to nearest ----

#if HWY_TARGET != HWY_AVX3 && HWY_TARGET != HWY_AVX3_DL
// Finds the positions of values in a code book.
class Positions {
 public:
  HWY_INLINE Positions() {}
  HWY_INLINE Positions(CodeBook, Rounding, float inverse) : inverse_(hn::Set(DF(), inverse)) {}
  // Returns r = x * inverse, and k of |r| before rounding (Map::Position). For an unsigned 0, k is
  // undefined.
  template <CodeBook kBook, Rounding kRounding>
  HWY_INLINE VF Of(VF x, VF* r) const {
    *r = hn::Mul(x, inverse_);
    return Map<kBook>::template Position<kRounding>(hn::Abs(*r));
  }

 private:
  VF inverse_;
};
#endif

// Returns k of x by kNoZero, with its sign in the signed book.
template <CodeBook kBook>
HWY_INLINE VI NoZeroNumber(const Positions& positions, VF x) {
  VF r;
  const VF position = positions.Of<kBook, Rounding::kNoZero>(x, &r);
  if (kBook == CodeBook::kSigned) return ToNearestInt(hn::CopySignToAbs(position, r));
  const auto some = hn::RebindMask(DI(), hn::Ne(x, hn::Zero(DF())));
  return hn::IfThenElseZero(some, ToNearestInt(position));
}

// Like NoZeroNumber, by kNearest. *near_tie: the lanes so near to a tie that only an exact
// comparison can decide.
template <CodeBook kBook>
HWY_INLINE VI NearestNumber(const Positions& positions, VF x, MF* near_tie) {
  const DF df;
  VF r;
  const VF position = positions.Of<kBook, Rounding::kNearest>(x, &r);
  const VF cut = hn::Abs(hn::Sub(position, hn::Round(position)));
  *near_tie = hn::Gt(cut, hn::Set(df, 0.5f - 1.0f / (1 << 14)));
  if (kBook == CodeBook::kUnsigned) return ToNearestInt(position);
  const VI k = ToNearestInt(hn::CopySignToAbs(position, r));
  // A negative value that is nearest to 0 keeps its sign.
  const DI di;
  const auto negative_zero =
      hn::And(hn::Eq(k, hn::Zero(di)), hn::Lt(hn::BitCast(di, x), hn::Zero(di)));
  return hn::Add(k, hn::VecFromMask(di, negative_zero));
}

// Recomputes exactly the lanes of a vector that are near a tie; their codes are right or off by
// one. `values` and `codes` begin at the block's first or second element.
template <CodeBook kBook>
HWY_NOINLINE void FixTies(MF near_tie, const float* values, float absmax, uint8_t* codes) {
  uint8_t bits[8] = {};
  hn::StoreMaskBits(DF(), near_tie, bits);
  for (size_t i = 0; i < FloatLanes(); ++i) {
    if ((bits[i / 8] & (1 << (i % 8))) == 0) continue;
    codes[2 * i] = reference::Encode(kBook, Rounding::kNearest, values[2 * i], absmax, 0);
  }
}

// ---- Blocks ----

// Encodes 256 codable values with their absmax, which must not be 0.
template <CodeBook kBook, Rounding kRounding>
HWY_INLINE void EncodeScaled(const float* HWY_RESTRICT values, float absmax, BlockRandom random,
                             uint8_t* HWY_RESTRICT codes) {
  const DF df;
  const VF inverse = hn::Set(df, 1 / absmax);
  const Positions positions(kBook, kRounding, 1 / absmax);
  for (size_t i = 0; i < kQuantBlock; i += FourLanes()) {
    VF x[4];
    VI k[4];
    MF near_tie[4];
    LoadFour(values + i, x);
    ORLOP_UNROLL
    for (size_t j = 0; j < 4; ++j) {
      if constexpr (kRounding == Rounding::kStochastic) {
        const VF unit = RandomUnits<2>(random, i + j / 2 * PairLanes() + j % 2);
        k[j] = Map<kBook>::Stochastic(x[j], inverse, unit);
      } else if constexpr (kRounding == Rounding::kNoZero) {
        k[j] = NoZeroNumber<kBook>(positions, x[j]);
      } else {
        k[j] = NearestNumber<kBook>(positions, x[j], &near_tie[j]);
      }
    }
    StoreNumbers<kBook>(k, codes + i);
    if constexpr (kRounding != Rounding::kNearest) continue;
    ORLOP_UNROLL
    for (size_t j = 0; j < 4; ++j) {
      if (HWY_LIKELY(hn::AllFalse(df, near_tie[j]))) continue;
      const size_t first = i + j / 2 * PairLanes() + j % 2;
      FixTies<kBook>(near_tie[j], values + first, absmax, codes + first);
    }
  }
}

// The scale of a block that is to be coded.
struct BlockScale {
  float absmax;    // largest magnitude of the codable values
  float before;    // factor that the values are multiplied by first
  bool is_number;  // false: some values are not codable
  HWY_INLINE explicit BlockScale(uint32_t largest_bits)
      : absmax(std::bit_cast<float>(largest_bits)),
        before(quantize_internal::ScaleOf(absmax)),
        is_number(largest_bits < 0x7F800000u) {}
};

// Writes 256 codes and returns absmax. `largest_bits`: M::LargestBits of the values.
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
    // A value that scaling rounds to 0 was not 0, so it becomes the smallest subnormal.
    const VF least = hn::Set(df, std::numeric_limits<float>::denorm_min());
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
