// Vector forms of random.h. Compiled once per instruction set.
#if defined(ORLOP_KERNELS_RANDOM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ORLOP_KERNELS_RANDOM_INL_H_
#undef ORLOP_KERNELS_RANDOM_INL_H_
#else
#define ORLOP_KERNELS_RANDOM_INL_H_
#endif

#include "kernels/random.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {
#if HWY_NATIVE_FMA

using VU = hn::Vec<DU>;

HWY_INLINE VU MixLanes(VU x) {
  const DU du;
  x = hn::Mul(hn::Xor(x, hn::ShiftRight<16>(x)), hn::Set(du, 0x7feb352du));
  x = hn::Mul(hn::Xor(x, hn::ShiftRight<15>(x)), hn::Set(du, 0x846ca68bu));
  return hn::Xor(x, hn::ShiftRight<16>(x));
}

// Returns the random bits of elements first .. first + lanes of the block; with kStride 2, of every
// other element.
template <int kStride = 1>
HWY_INLINE VU RandomLanes(BlockRandom block, size_t first) {
  const DU du;
  const VU element = hn::Add(hn::ShiftLeft<kStride - 1>(hn::Iota(du, 0)),
                             hn::Set(du, static_cast<uint32_t>(first)));
  return MixLanes(
      hn::Add(MixLanes(hn::Xor(element, hn::Set(du, block.low))), hn::Set(du, block.high)));
}
template <int kStride>
HWY_INLINE VF RandomUnits(BlockRandom block, size_t first) {
  const VI bits = hn::BitCast(DI(), hn::ShiftRight<8>(RandomLanes<kStride>(block, first)));
  return hn::Mul(hn::ConvertTo(DF(), bits), hn::Set(DF(), 0x1p-24f));
}

#endif  // HWY_NATIVE_FMA
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
