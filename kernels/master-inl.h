// Joins the fp32 master of one 256-element block from its stored parts, and splits it (optimizer.h,
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

// Joins exact masters. The high half of a master is weight + (remainder < 0 ? -1 : 0), the low half
// is the remainder.
HWY_INLINE Pair JoinPair(const uint16_t* HWY_RESTRICT weight,
                         const int16_t* HWY_RESTRICT remainder) {
  const hn::Repartition<uint16_t, DF> d16;
  const hn::Repartition<int16_t, DF> di16;
  const DU du;
  const auto remainders = hn::LoadU(di16, remainder);
  const auto high =
      hn::Add(hn::LoadU(d16, weight), hn::BitCast(d16, hn::ShiftRight<15>(remainders)));
  const auto low = hn::BitCast(d16, remainders);
  const auto high_of_even = hn::BitCast(d16, hn::ShiftLeft<16>(hn::BitCast(du, high)));
  const auto low_of_odd = hn::BitCast(d16, hn::ShiftRight<16>(hn::BitCast(du, low)));
  return {hn::BitCast(DF(), hn::OddEven(high_of_even, low)),
          hn::BitCast(DF(), hn::OddEven(high, low_of_odd))};
}

// Splits exact masters. The remainder is the low half; the weight is the high half after adding
// half a step.
HWY_INLINE void SplitPair(Pair master, uint16_t* HWY_RESTRICT weight,
                          int16_t* HWY_RESTRICT remainder) {
  const hn::Repartition<uint16_t, DF> d16;
  const hn::Repartition<int16_t, DF> di16;
  const DU du;
  const auto even = hn::BitCast(du, CanonicalIfNaN(master.even));
  const auto odd = hn::BitCast(du, CanonicalIfNaN(master.odd));
  const auto half = hn::Set(du, 0x8000);
  const auto high_of_even = hn::ShiftRight<16>(hn::Add(even, half));
  const auto high_of_odd = hn::Add(odd, half);
  const auto low_of_odd = hn::ShiftLeft<16>(odd);
  hn::StoreU(hn::OddEven(hn::BitCast(d16, high_of_odd), hn::BitCast(d16, high_of_even)), d16,
             weight);
  hn::StoreU(hn::OddEven(hn::BitCast(di16, low_of_odd), hn::BitCast(di16, even)), di16, remainder);
}

HWY_INLINE void JoinExact(const uint16_t* HWY_RESTRICT weight,
                          const int16_t* HWY_RESTRICT remainder, float* HWY_RESTRICT master) {
  for (size_t i = 0; i < kQuantBlock; i += PairLanes()) {
    StorePair(JoinPair(weight + i, remainder + i), master + i);
  }
}

HWY_INLINE void SplitExact(const float* HWY_RESTRICT master, uint16_t* HWY_RESTRICT weight,
                           int16_t* HWY_RESTRICT remainder) {
  for (size_t i = 0; i < kQuantBlock; i += PairLanes()) {
    SplitPair(LoadPair(master + i), weight + i, remainder + i);
  }
}

// Adds the low `kBits` random bits to fp32 bits, so that cutting those bits off rounds up with a
// probability equal to the part cut off. Infinities and NaN (made canonical) do not change.
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
