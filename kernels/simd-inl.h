// Vector forms of the reference's operations, compiled once per instruction set: casts, masters and
// the operations of arithmetic.h. Functions work on whole vectors of fp32 lanes; kernels pass them
// 256-element blocks and pad short ones.
#if defined(ORLOP_KERNELS_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ORLOP_KERNELS_SIMD_INL_H_
#undef ORLOP_KERNELS_SIMD_INL_H_
#else
#define ORLOP_KERNELS_SIMD_INL_H_
#endif

#include <cstring>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/types.h"

// Small arrays of vectors stay in registers only if the loops over them are unrolled.
#define ORLOP_UNROLL _Pragma("GCC unroll 8")

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {
#if HWY_NATIVE_FMA
namespace hn = hwy::HWY_NAMESPACE;

// One vector of fp32 lanes, and the vectors of other types with as many lanes.
using DF = hn::ScalableTag<float>;
using DI = hn::Rebind<int32_t, DF>;
using DU = hn::Rebind<uint32_t, DF>;
using DI16 = hn::Rebind<int16_t, DF>;
using DU16 = hn::Rebind<uint16_t, DF>;
using DF16 = hn::Rebind<hwy::float16_t, DF>;
using DU8 = hn::Rebind<uint8_t, DF>;
using VF = hn::Vec<DF>;
using VI = hn::Vec<DI>;
using VU16 = hn::Vec<DU16>;
using VI16 = hn::Vec<DI16>;
using MF = hn::Mask<DF>;

HWY_INLINE size_t FloatLanes() { return hn::Lanes(DF()); }

// Holds a copy of the first `count` elements of a short block, padded to a whole block.
template <class T>
class PaddedBlock {
 public:
  explicit PaddedBlock(T padding) {
    for (T& element : data_) element = padding;
  }
  PaddedBlock(const T* source, size_t count, T padding) : PaddedBlock(padding) {
    memcpy(data_, source, count * sizeof(T));
  }
  void CopyTo(T* destination, size_t count) const { memcpy(destination, data_, count * sizeof(T)); }
  T* get() { return data_; }
  const T* get() const { return data_; }

 private:
  HWY_ALIGN_MAX T data_[kQuantBlock];
};

// ---- The operations of arithmetic.h ----

struct VectorArithmetic {
  using F = VF;
  static HWY_INLINE F Set(float x) { return hn::Set(DF(), x); }
  static HWY_INLINE F Add(F a, F b) { return hn::Add(a, b); }
  static HWY_INLINE F Sub(F a, F b) { return hn::Sub(a, b); }
  static HWY_INLINE F Mul(F a, F b) { return hn::Mul(a, b); }
  static HWY_INLINE F Div(F a, F b) { return hn::Div(a, b); }
  static HWY_INLINE F Sqrt(F a) { return hn::Sqrt(a); }
  static HWY_INLINE F MulAdd(F a, F b, F c) { return hn::MulAdd(a, b, c); }
  static HWY_INLINE F NegMulAdd(F a, F b, F c) { return hn::NegMulAdd(a, b, c); }
  static HWY_INLINE F Max(F a, F b) { return hn::IfThenElse(hn::Gt(a, b), a, b); }
  static HWY_INLINE F Sign(F a) {
    const F zero = hn::Zero(DF());
    const F one = Set(1);
    return hn::Sub(hn::IfThenElseZero(hn::Gt(a, zero), one),
                   hn::IfThenElseZero(hn::Lt(a, zero), one));
  }
};

// ---- Memory ----

// Prefetches what is read next. The hardware prefetcher stops at the end of a page and restarts
// slowly: without this a pass over arrays far from the cache took up to 1.7 times as long.
HWY_INLINE void Prefetch(const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) hwy::Prefetch(static_cast<const uint8_t*>(from) + i);
}

// ---- Casts ----

HWY_INLINE VF CanonicalIfNaN(VF v) {
  const DF df;
  return hn::IfThenElse(hn::IsNaN(v), hn::BitCast(df, hn::Set(DU(), 0x7FC00000u)), v);
}

HWY_INLINE VF FromBF16(VU16 bits) {
  return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(DU(), bits)));
}

HWY_INLINE VF FromF16(VU16 bits) {
  return CanonicalIfNaN(hn::PromoteTo(DF(), hn::BitCast(DF16(), bits)));
}

// Keeps the low 16 bits of lanes, which must be below 2^16.
HWY_INLINE VU16 Narrow(hn::Vec<DU> bits) { return hn::DemoteTo(DU16(), hn::BitCast(DI(), bits)); }

HWY_INLINE VU16 ToBF16(VF v) {
  const DU du;
  const auto bits = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFF))));
  return Narrow(hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), hn::Set(du, 0x7FC0), rounded));
}

HWY_INLINE VU16 ToF16(VF v) { return hn::BitCast(DU16(), hn::DemoteTo(DF16(), CanonicalIfNaN(v))); }

// Loads the next lanes of a gradient or weight of any type, at any alignment.
HWY_INLINE hn::Vec<DU16> LoadBits16(const uint8_t* from) {
  const hn::Repartition<uint8_t, DU16> bytes;
  return hn::BitCast(DU16(), hn::LoadU(bytes, from));
}

template <DType kType>
HWY_INLINE VF LoadTyped(const uint8_t* from) {
  if constexpr (kType == DType::kF32) {
    const hn::Repartition<uint8_t, DF> bytes;
    return hn::BitCast(DF(), hn::LoadU(bytes, from));
  } else if constexpr (kType == DType::kBF16) {
    return FromBF16(LoadBits16(from));
  } else {
    return FromF16(LoadBits16(from));
  }
}

// ---- Pairs ----

// The even and the odd elements of two vectors' worth of elements. With them 16-bit and 4-bit
// elements are split and joined by shifts and masks.
struct Pair {
  VF even, odd;
};
HWY_INLINE size_t PairLanes() { return 2 * FloatLanes(); }

HWY_INLINE Pair LoadPair(const float* from) {
  VF even, odd;
  hn::LoadInterleaved2(DF(), from, even, odd);
  return {even, odd};
}
HWY_INLINE void StorePair(Pair pair, float* to) {
  hn::StoreInterleaved2(pair.even, pair.odd, DF(), to);
}

// Widens bf16 elements.
HWY_INLINE Pair WidenPair(hn::Vec<hn::Repartition<uint8_t, DF>> bytes) {
  const auto both = hn::BitCast(DU(), bytes);
  const auto odd = hn::And(both, hn::Set(DU(), 0xFFFF0000u));
  return {hn::BitCast(DF(), hn::ShiftLeft<16>(both)), hn::BitCast(DF(), odd)};
}

template <DType kType>
HWY_INLINE Pair LoadTypedPair(const uint8_t* from) {
  if constexpr (kType == DType::kBF16) {
    return WidenPair(hn::LoadU(hn::Repartition<uint8_t, DF>(), from));
  } else {
    static_assert(kType == DType::kF32);
    return LoadPair(reinterpret_cast<const float*>(from));
  }
}

template <DType kType>
HWY_INLINE void WidenBlock(const uint8_t* from, float* HWY_RESTRICT to) {
  for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
    hn::StoreU(LoadTyped<kType>(from + i * SizeOf(kType)), DF(), to + i);
  }
}

HWY_INLINE void WidenBlock(DType dtype, const uint8_t* from, float* HWY_RESTRICT to) {
  switch (dtype) {
    case DType::kF32:
      return WidenBlock<DType::kF32>(from, to);
    case DType::kBF16:
      return WidenBlock<DType::kBF16>(from, to);
    case DType::kF16:
      return WidenBlock<DType::kF16>(from, to);
  }
}

// Widens the block that begins at element `begin`. A short block is padded with zeros to 256.
HWY_INLINE void WidenPaddedBlock(TypedSpan source, size_t begin, float* HWY_RESTRICT to) {
  const TypedSpan block = Slice(source, begin, kQuantBlock);
  const uint8_t* from = static_cast<const uint8_t*>(block.data);
  if (block.count == kQuantBlock) return WidenBlock(block.dtype, from, to);
  HWY_ALIGN_MAX uint8_t padded[kQuantBlock * sizeof(float)] = {};
  memcpy(padded, from, block.count * SizeOf(block.dtype));
  WidenBlock(block.dtype, padded, to);
}

// ---- The master ----

HWY_INLINE VF JoinLanes(const uint16_t* weight, const int16_t* remainder) {
  const DI di;
  const auto high =
      hn::BitCast(di, hn::ShiftLeft<16>(hn::PromoteTo(DU(), hn::LoadU(DU16(), weight))));
  return hn::BitCast(DF(), hn::Add(high, hn::PromoteTo(di, hn::LoadU(DI16(), remainder))));
}

HWY_INLINE void SplitLanes(VF master, uint16_t* weight, int16_t* remainder) {
  const DU du;
  const auto bits = hn::BitCast(du, CanonicalIfNaN(master));  // 0x7FC00000 splits to (0x7FC0, 0)
  const auto high = hn::ShiftRight<16>(hn::Add(bits, hn::Set(du, 0x8000)));
  const auto low = hn::Sub(bits, hn::ShiftLeft<16>(high));
  hn::StoreU(Narrow(high), DU16(), weight);
  hn::StoreU(hn::DemoteTo(DI16(), hn::BitCast(DI(), low)), DI16(), remainder);
}

#endif  // HWY_NATIVE_FMA
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
