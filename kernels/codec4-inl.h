// Vector forms of the 4-bit maps (quantize.h): a 256-element block is two 128-element blocks, with
// two codes to a byte. Compiled once per instruction set.
#if defined(ORLOP_KERNELS_CODEC4_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ORLOP_KERNELS_CODEC4_INL_H_
#undef ORLOP_KERNELS_CODEC4_INL_H_
#else
#define ORLOP_KERNELS_CODEC4_INL_H_
#endif

#include "kernels/code_books4.h"
#include "kernels/codec-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {
#if HWY_NATIVE_FMA

// Returns table entries chosen per lane by `index` (0..15).
HWY_INLINE VF Lookup16(const std::array<float, 16>& table, VI index) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  return Lookup8(table, index);  // uses four bits of the index
#elif HWY_TARGET == HWY_AVX2
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table.data()), index.raw);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table.data() + 8), index.raw);
  return VF{_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index.raw, 28)))};
#else
  return hn::GatherIndex(DF(), table.data(), index);
#endif
}

HWY_INLINE void Decode4(bool is_signed, const uint8_t* codes, const float* absmax, float* values) {
  const DI di;
  const auto& book = is_signed ? kSigned4CodeBook : kUnsigned4CodeBook;
  for (size_t i = 0; i < kQuantBlock; i += PairLanes()) {
    const VF scale = hn::Set(DF(), absmax[i / kFourBitBlock]);
    const VI both = hn::PromoteTo(di, hn::LoadU(DU8(), codes + i / 2));
    StorePair({hn::Mul(Lookup16(book, hn::And(both, hn::Set(di, 15))), scale),
               hn::Mul(Lookup16(book, hn::ShiftRight<4>(both)), scale)},
              values + i);
  }
}

// Returns the signed code of r: the number of the ascending thresholds that r reaches, by
// bisection.
HWY_INLINE VI SignedCode4(VF r, const std::array<float, 16>& thresholds) {
  const DI di;
  VI code = hn::Zero(di);
  for (int half = 8; half > 0; half /= 2) {
    const VI tried = hn::Add(code, hn::Set(di, half));
    const MF reached = hn::Ge(r, Lookup16(thresholds, tried));
    code = hn::IfThenElse(hn::RebindMask(di, reached), tried, code);
  }
  return code;
}

// Returns the codes of r for every other element from `at` on.
HWY_INLINE VI Code4(bool is_signed, bool stochastic, VF r, BlockRandom random, size_t at) {
  const DF df;
  const DI di;
  const VF unit = stochastic ? RandomUnits<2>(random, at) : hn::Zero(df);
  if (!is_signed) {  // entry k / 16, k from 1
    const VF position = hn::Mul(r, hn::Set(df, 16));
    const VF k = stochastic ? hn::Floor(hn::Add(position, unit)) : hn::Round(position);
    const VF code = hn::Max(hn::Sub(k, hn::Set(df, 1)), hn::Zero(df));
    return hn::ConvertTo(di, hn::Min(code, hn::Set(df, 15)));
  }
  if (!stochastic) return SignedCode4(r, kSigned4Thresholds);
  const VI low = SignedCode4(r, kSigned4CodeBook);
  const VF part =
      hn::Mul(hn::Sub(r, Lookup16(kSigned4CodeBook, low)), Lookup16(kSigned4InverseGaps, low));
  const auto up = hn::RebindMask(di, hn::Lt(unit, part));
  return hn::IfThenElse(up, hn::Add(low, hn::Set(di, 1)), low);
}

HWY_INLINE void Encode4(bool is_signed, Rounding rounding, const float* values, BlockRandom random,
                        uint8_t* codes, float* absmax) {
  const DF df;
  const bool stochastic = rounding == Rounding::kStochastic;
  HWY_ALIGN_MAX float codable[kQuantBlock];
  for (size_t i = 0; i < kQuantBlock; i += FloatLanes()) {
    const VF x = hn::LoadU(df, values + i);
    hn::Store(is_signed ? Map<CodeBook::kSigned>::Codable(x) : Map<CodeBook::kUnsigned>::Codable(x),
              df, codable + i);
  }
  for (size_t begin = 0; begin < kQuantBlock; begin += kFourBitBlock) {
    VF largest = hn::Zero(df);
    for (size_t i = begin; i < begin + kFourBitBlock; i += FloatLanes()) {
      largest = hn::Max(largest, hn::Abs(hn::Load(df, codable + i)));
    }
    const float block_absmax = hn::GetLane(hn::MaxOfLanes(df, largest));
    absmax[begin / kFourBitBlock] = block_absmax;
    const float scale = quantize_internal::ScaleOf(block_absmax);
    const VF inverse = hn::Set(df, block_absmax == 0 ? 0 : 1 / (block_absmax * scale));
    const auto code = [&](VF x, size_t at) HWY_ATTR {
      const VF r = hn::Mul(hn::Mul(x, hn::Set(df, scale)), inverse);
      return Code4(is_signed, stochastic, r, random, at);
    };
    for (size_t i = begin; i < begin + kFourBitBlock; i += PairLanes()) {
      const Pair pair = LoadPair(codable + i);
      const VI both = hn::Or(code(pair.even, i), hn::ShiftLeft<4>(code(pair.odd, i + 1)));
      hn::StoreU(hn::DemoteTo(DU8(), both), DU8(), codes + i / 2);
    }
  }
}

#endif  // HWY_NATIVE_FMA
}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
