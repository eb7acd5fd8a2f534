// The fp32 master of one 256-element block from what is stored, and back (optimizer.h,
// MasterFormat; casts.h). Compiled once per instruction set.
#if defined(ORLOP_KERNELS_MASTER_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ORLOP_KERNELS_MASTER_INL_H_
#undef ORLOP_KERNELS_MASTER_INL_H_
#else
#define ORLOP_KERNELS_MASTER_INL_H_
#endif

#include "kernels/random-inl.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {
#if HWY_NATIVE_FMA

// Two vectors of exact masters, and back.
HWY_INLINE void JoinTwo(const uint16_t* HWY_RESTRICT weight, const int16_t* HWY_RESTRICT remainder,
                        VF* first, VF* second) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  // weight + (remainder < 0 ? -1 : 0) and remainder are the high and low halves of the sum.
  const __m512i order0 =
      _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                       37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i order1 = _mm512_add_epi16(order0, _mm512_set1_epi16(16));
  const __m512i low = _mm512_loadu_si512(remainder);
  const __m512i high = _mm512_add_epi16(_mm512_loadu_si512(weight), _mm512_srai_epi16(low, 15));
  first->raw = _mm512_castsi512_ps(_mm512_permutex2var_epi16(low, order0, high));
  second->raw = _mm512_castsi512_ps(_mm512_permutex2var_epi16(low, order1, high));
#else
  *first = JoinLanes(weight, remainder);
  *second = JoinLanes(weight + FloatLanes(), remainder + FloatLanes());
#endif
}

HWY_INLINE void SplitTwo(VF first, VF second, uint16_t* HWY_RESTRICT weight,
                         int16_t* HWY_RESTRICT remainder) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  // The remainder is the low half; the weight the high half of what is half a step more.
  const __m512i low =
      _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                       24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(1));
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i a = _mm512_castps_si512(CanonicalIfNaN(first).raw);
  const __m512i b = _mm512_castps_si512(CanonicalIfNaN(second).raw);
  _mm512_storeu_si512(weight, _mm512_permutex2var_epi16(_mm512_add_epi32(a, half), high,
                                                        _mm512_add_epi32(b, half)));
  _mm512_storeu_si512(remainder, _mm512_permutex2var_epi16(a, low, b));
#else
  SplitLanes(first, weight, remainder);
  SplitLanes(second, weight + FloatLanes(), remainder + FloatLanes());
#endif
}

HWY_INLINE void JoinExact(const uint16_t* HWY_RESTRICT weight,
                          const int16_t* HWY_RESTRICT remainder, float* HWY_RESTRICT master) {
  const size_t lanes = FloatLanes();
  for (size_t i = 0; i < kQuantBlock; i += 2 * lanes) {
    VF first, second;
    JoinTwo(weight + i, remainder + i, &first, &second);
    hn::StoreU(first, DF(), master + i);
    hn::StoreU(second, DF(), master + i + lanes);
  }
}

HWY_INLINE void SplitExact(const float* HWY_RESTRICT master, uint16_t* HWY_RESTRICT weight,
                           int16_t* HWY_RESTRICT remainder) {
  const size_t lanes = FloatLanes();
  for (size_t i = 0; i < kQuantBlock; i += 2 * lanes) {
    SplitTwo(hn::LoadU(DF(), master + i), hn::LoadU(DF(), master + i + lanes), weight + i,
             remainder + i);
  }
}

// Adds the low `kBits` random bits to fp32 bits, so that cutting them off rounds up with the
// probability of what is cut. Infinities and NaN (made canonical) stay.
template <int kBits>
HWY_INLINE hn::Vec<DU> Dithered(VF master, BlockRandom random, size_t first) {
  const DU du;
  const VF number = CanonicalIfNaN(master);
  const auto bits = hn::BitCast(du, number);
  const auto dither = hn::ShiftRight<32 - kBits>(RandomLanes(random, first));
  const auto is_finite = hn::RebindMask(
      du, hn::Lt(hn::Abs(number), hn::Set(DF(), std::numeric_limits<float>::infinity())));
  return hn::Add(bits, hn::IfThenElseZero(is_finite, dither));
}

HWY_INLINE void Join24(const uint16_t* HWY_RESTRICT weight, const int8_t* HWY_RESTRICT remainder,
                       float* HWY_RESTRICT master) {
  const DI di;
  const hn::Rebind<int8_t, DF> di8;
  for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
    const auto high =
        hn::BitCast(di, hn::ShiftLeft<16>(hn::PromoteTo(DU(), hn::LoadU(DU16(), weight + i))));
    const auto low = hn::ShiftLeft<8>(hn::PromoteTo(di, hn::LoadU(di8, remainder + i)));
    hn::StoreU(hn::BitCast(DF(), hn::Add(high, low)), DF(), master + i);
  }
}

HWY_INLINE void Split24(const float* HWY_RESTRICT master, BlockRandom random,
                        uint16_t* HWY_RESTRICT weight, int8_t* HWY_RESTRICT remainder) {
  const DU du;
  const hn::Rebind<int8_t, DF> di8;
  for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
    const auto bits = Dithered<8>(hn::LoadU(DF(), master + i), random, i);
    const auto kept = hn::ShiftRight<8>(bits);
    const auto high = hn::ShiftRight<16>(hn::Add(bits, hn::Set(du, 0x8000)));
    hn::StoreU(Narrow(high), DU16(), weight + i);
    const auto low = hn::BitCast(DI(), hn::Sub(kept, hn::ShiftLeft<8>(high)));
    hn::StoreU(hn::DemoteTo(di8, low), di8, remainder + i);
  }
}

HWY_INLINE void SplitBF16(const float* HWY_RESTRICT master, BlockRandom random,
                          uint16_t* HWY_RESTRICT weight) {
  for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
    const auto bits = Dithered<16>(hn::LoadU(DF(), master + i), random, i);
    hn::StoreU(Narrow(hn::ShiftRight<16>(bits)), DU16(), weight + i);
  }
}

#endif  // HWY_NATIVE_FMA
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
