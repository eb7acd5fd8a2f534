// Vector forms of the reference's elements, compiled once per instruction set. Everything here
// works on whole vectors of fp32 lanes; kernels feed it 256-element blocks and pad short ones.
#if defined(ORLOP_KERNELS_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ORLOP_KERNELS_SIMD_INL_H_
#undef ORLOP_KERNELS_SIMD_INL_H_
#else
#define ORLOP_KERNELS_SIMD_INL_H_
#endif

#include <bit>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/code_books.h"
#include "kernels/quantize.h"
#include "kernels/reference.h"
#include "kernels/types.h"

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

// A copy of the first `count` elements of a short block, padded to a whole one.
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

 private:
  HWY_ALIGN_MAX T data_[kQuantBlock];
};

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

// Keeps the low 16 bits of lanes that are below 2^16.
HWY_INLINE VU16 Narrow(hn::Vec<DU> bits) { return hn::DemoteTo(DU16(), hn::BitCast(DI(), bits)); }

HWY_INLINE VU16 ToBF16(VF v) {
  const DU du;
  const auto bits = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFF))));
  return Narrow(hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), hn::Set(du, 0x7FC0), rounded));
}

HWY_INLINE VU16 ToF16(VF v) { return hn::BitCast(DU16(), hn::DemoteTo(DF16(), CanonicalIfNaN(v))); }

// Lanes i .. of a gradient or weight of any type, at any alignment.
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

// Widens the block that begins at element `begin`; a short one is padded with zeros to 256.
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

// ---- The dynamic map (code_books.h has the formulas) ----

// Eight table entries, chosen per lane by `slot` (0..7). The table repeats for 16 lanes.
HWY_INLINE VF Lookup8(const std::array<float, 16>& table, VI slot) {
  const DF df;
#if HWY_MAX_BYTES >= 32
  return hn::TableLookupLanes(hn::Load(df, table.data()), hn::IndicesFromVec(df, slot));
#else
  return hn::GatherIndex(df, table.data(), slot);
#endif
}

template <CodeBook kBook>
struct Map {
  static constexpr bool kIsSigned = kBook == CodeBook::kSigned;
  static constexpr const code_book_internal::SlotTables& kSlots =
      kIsSigned ? code_book_internal::kSignedSlots : code_book_internal::kUnsignedSlots;
  static constexpr const code_book_internal::DecadeTables& kDecadeTables =
      kIsSigned ? code_book_internal::kSignedDecades : code_book_internal::kUnsignedDecades;
  static constexpr float kSmallest =
      kIsSigned ? code_book_internal::kSignedSmallest : code_book_internal::kUnsignedSmallest;

  // numerator / denominator, correctly rounded for every entry of the book (a test compares them
  // all): one Newton step on the product with the reciprocal.
  static HWY_INLINE VF Quotient(VF numerator, VF denominator, VF reciprocal) {
    const VF estimate = hn::Mul(numerator, reciprocal);
    const VF error = hn::NegMulAdd(estimate, denominator, numerator);
    return hn::MulAdd(error, reciprocal, estimate);
  }

  static HWY_INLINE VF Decode(const uint8_t* codes, VF absmax) {
    const DF df;
    const DI di;
    const VI code = hn::PromoteTo(di, hn::LoadU(DU8(), codes));
    const VI offset_code =
        kIsSigned ? hn::Sub(code, hn::Set(di, kSignedZeroCode)) : hn::Add(code, hn::Set(di, 1));
    const VF k = hn::ConvertTo(df, kIsSigned ? hn::Abs(offset_code) : offset_code);
    const VI slot = hn::And(hn::ShiftRight<23>(hn::BitCast(di, k)), hn::Set(di, 7));
    const VF numerator = hn::MulAdd(hn::Set(df, 18.0f), k, Lookup8(kSlots.offset, slot));
    VF value =
        Quotient(numerator, Lookup8(kSlots.denominator, slot), Lookup8(kSlots.reciprocal, slot));
    if constexpr (kIsSigned) {
      value = hn::IfThenElse(hn::Eq(k, hn::Zero(df)), hn::Zero(df), value);
      value = hn::CopySignToAbs(value, hn::BitCast(df, offset_code));
    }
    return hn::Mul(value, absmax);
  }

  // What is coded for x: NaN as 0, infinities as +-FLT_MAX, unsigned negatives as +0.
  static HWY_INLINE VF Codable(VF x) {
    const DF df;
    const VF largest = hn::Set(df, hwy::HighestValue<float>());
    const VF number = hn::IfThenElse(hn::IsNaN(x), hn::Zero(df), x);
    if (kIsSigned) return hn::Min(hn::Max(number, hn::Neg(largest)), largest);
    return hn::Abs(hn::Min(hn::Max(number, hn::Zero(df)), largest));
  }

  // The decade whose range of rounding holds the magnitude a (0..1); 7 for 1.0, 0 for what is less.
  static HWY_INLINE VI DecadeOf(VF a) {
    const DF df;
    const DI di;
    // The bits of a positive float, as a number, are 2^23 (127 + log2 a) less up to 0.0861 * 2^23.
    // So this guess is the decade or the one above it.
    const VF bits = hn::ConvertTo(df, hn::BitCast(di, a));
    constexpr float kLog10Of2 = 0.30103f;
    const VF guess =
        hn::MulAdd(bits, hn::Set(df, kLog10Of2 / (1 << 23)), hn::Set(df, 7.03f - 127 * kLog10Of2));
    const VI decade = hn::ConvertTo(di, hn::Max(guess, hn::Zero(df)));
    const MF below = hn::Lt(a, Lookup8(kDecadeTables.lower_bound, decade));
    return hn::Add(decade, hn::BitCast(di, hn::VecFromMask(df, below)));
  }

  // Codes of one vector. x is codable; divisor is absmax, or 1 for a block of zeros.
  // Returns whether some element is so near to a tie that only exact comparison can tell: k before
  // rounding is off by less than 5e-5, the sum of a few fp32 roundings at magnitude 256 or less and
  // of the rounding of the two entries.
  template <Rounding kRounding>
  static HWY_INLINE bool Encode(VF x, VF divisor, uint8_t* codes) {
    const DF df;
    const VF r = hn::Div(x, divisor);
    const VF a = hn::Abs(r);
    const VI decade = DecadeOf(a);
    const VF first = Lookup8(kDecadeTables.first, decade);
    const VF last = hn::MulAdd(first, hn::Set(df, 2.0f), hn::Set(df, -1.0f));
    const VF position =
        hn::MulAdd(a, Lookup8(kDecadeTables.scale, decade), Lookup8(kDecadeTables.bias, decade));
    const VF within = hn::Min(hn::Max(position, first), last);
    const VF k = hn::Round(within);
    const MF near_tie = hn::Gt(hn::Abs(hn::Sub(within, k)), hn::Set(df, 0.5f - 1.0f / (1 << 14)));
    // kNoZero looks at x: r may have underflowed.
    const MF is_zero = kRounding == Rounding::kNoZero ? hn::Eq(x, hn::Zero(df))
                                                      : hn::Lt(a, hn::Set(df, kSmallest));
    VF code;
    if constexpr (kIsSigned) {  // -1.0 gives -1, which saturates to code 0
      const VF signed_k = hn::CopySignToAbs(hn::IfThenZeroElse(is_zero, k), r);
      code = hn::Add(signed_k, hn::Set(df, static_cast<float>(kSignedZeroCode)));
    } else {
      code = hn::IfThenZeroElse(is_zero, hn::Sub(k, hn::Set(df, 1.0f)));
    }
    hn::StoreU(hn::DemoteTo(DU8(), hn::ConvertTo(DI(), code)), DU8(), codes);
    return !hn::AllFalse(df, near_tie);
  }

  // Largest magnitude of a block, as bits; 0x7F800000 or more if some element is not codable.
  static HWY_INLINE uint32_t LargestBits(const float* HWY_RESTRICT values) {
    const DU du;
    auto largest = hn::Zero(du);
    for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
      const VF x = hn::LoadU(DF(), values + i);
      largest = hn::Max(largest, hn::BitCast(du, kIsSigned ? hn::Abs(x) : x));
    }
    return hn::GetLane(hn::MaxOfLanes(du, largest));
  }
};

template <CodeBook kBook>
HWY_INLINE void DecodeBlock(const uint8_t* codes, float absmax, float* HWY_RESTRICT values) {
  const VF scale = hn::Set(DF(), absmax);
  for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
    hn::StoreU(Map<kBook>::Decode(codes + i, scale), DF(), values + i);
  }
}

// Writes 256 codes and returns absmax.
template <CodeBook kBook, Rounding kRounding>
HWY_INLINE float EncodeBlock(const float* HWY_RESTRICT values, uint8_t* codes) {
  const DF df;
  using M = Map<kBook>;
  HWY_ALIGN_MAX float scrubbed[kQuantBlock];
  uint32_t largest_bits = M::LargestBits(values);
  if (HWY_UNLIKELY(largest_bits >= 0x7F800000u)) {
    for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
      hn::Store(M::Codable(hn::LoadU(df, values + i)), df, scrubbed + i);
    }
    values = scrubbed;
    largest_bits = M::LargestBits(values);
  }
  const float absmax = std::bit_cast<float>(largest_bits);
  const VF divisor = hn::Set(df, absmax == 0 ? 1 : absmax);
  for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
    const VF x = hn::LoadU(df, values + i);
    if (HWY_LIKELY(!M::template Encode<kRounding>(x, divisor, codes + i))) continue;
    for (size_t j = i; j < i + FloatLanes(); ++j) {
      codes[j] = reference::Encode(kBook, kRounding, values[j], absmax);
    }
  }
  return absmax;
}

template <CodeBook kBook>
HWY_INLINE float EncodeBlock(Rounding rounding, const float* HWY_RESTRICT values, uint8_t* codes) {
  if (kBook == CodeBook::kUnsigned && rounding == Rounding::kNoZero) {
    return EncodeBlock<kBook, Rounding::kNoZero>(values, codes);
  }
  return EncodeBlock<kBook, Rounding::kNearest>(values, codes);
}

#endif  // HWY_NATIVE_FMA
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
