// The 8-bit dynamic map on AVX-512: segments found by permutes of 32 entries, and, with byte
// permutes (VBMI), tables of 256 in registers. codec-inl.h has the forms for every instruction set.
#if defined(ORLOP_KERNELS_CODEC_AVX512_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ORLOP_KERNELS_CODEC_AVX512_INL_H_
#undef ORLOP_KERNELS_CODEC_AVX512_INL_H_
#else
#define ORLOP_KERNELS_CODEC_AVX512_INL_H_
#endif

#include "kernels/code_books.h"
#include "kernels/quantize.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_AVX3_DL
// One byte of 64 table entries: two permutes of half the table each.
HWY_INLINE __m512i LookupPlane(const std::array<uint8_t, 256>& plane, __m512i codes) {
  const uint8_t* table = plane.data();
  const __m512i low =
      _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), codes,
                                                _mm512_load_si512(table + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
}

// The entries of 64 codes, in index order, as four vectors.
HWY_INLINE void DecodeByPermutes(const code_book_internal::BytePlanes& book,
                                 const uint8_t* HWY_RESTRICT codes, VF* entries) {
  // Ordered so that interleaving, which stays within 128 bits, ends in index order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i c = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
  const __m512i b0 = LookupPlane(book.plane[0], c), b1 = LookupPlane(book.plane[1], c);
  const __m512i b2 = LookupPlane(book.plane[2], c), b3 = LookupPlane(book.plane[3], c);
  const __m512i low01 = _mm512_unpacklo_epi8(b0, b1), high01 = _mm512_unpackhi_epi8(b0, b1);
  const __m512i low23 = _mm512_unpacklo_epi8(b2, b3), high23 = _mm512_unpackhi_epi8(b2, b3);
  entries[0].raw = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23));
  entries[1].raw = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23));
  entries[2].raw = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23));
  entries[3].raw = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23));
}
#endif  // HWY_AVX3_DL

#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
// As Map::Nearest, for kNoZero of both books and kNearest of the unsigned one.
class SegmentEncoder {
 public:
  HWY_INLINE SegmentEncoder(const code_book_internal::SegmentTables& tables, float inverse)
      : inverse_(_mm512_set1_ps(inverse)),
        segment0_(_mm512_load_si512(&tables.segment[0])),
        segment1_(_mm512_load_si512(&tables.segment[16])),
        next0_(_mm512_load_ps(&tables.next[0])),
        next1_(_mm512_load_ps(&tables.next[16])),
        scale_(_mm512_load_ps(tables.scale.data())),
        bias_(_mm512_load_ps(tables.bias.data())),
        last_(_mm512_load_ps(tables.last.data())) {}

  template <bool kIsSigned>
  HWY_INLINE VI Code(VF x, MF* near_tie) const {
    const __m512 r = _mm512_mul_ps(x.raw, inverse_);
    // The larger magnitude of r and 2^-31.
    const __m512 a = _mm512_range_ps(r, _mm512_set1_ps(0x1p-31f), 0b1011);
    const __m512i exponent = _mm512_srli_epi32(_mm512_castps_si512(a), 23);
    const __mmask16 next =
        _mm512_cmp_ps_mask(a, _mm512_permutex2var_ps(next0_, exponent, next1_), _CMP_GE_OQ);
    const __m512i begin = _mm512_permutex2var_epi32(segment0_, exponent, segment1_);
    const __m512i segment = _mm512_mask_add_epi32(begin, next, begin, _mm512_set1_epi32(1));
    const __m512 position = _mm512_fmadd_ps(a, _mm512_permutexvar_ps(segment, scale_),
                                            _mm512_permutexvar_ps(segment, bias_));
    const __m512 within = _mm512_min_ps(position, _mm512_permutexvar_ps(segment, last_));
    // What rounding takes away. The roundings of the sum below show only where this is near a tie.
    const __m512 cut = _mm512_abs_ps(_mm512_reduce_ps(within, 0));
    near_tie->raw = _mm512_cmp_ps_mask(cut, _mm512_set1_ps(0.5f - 1.0f / (1 << 14)), _CMP_GT_OQ);
    if constexpr (kIsSigned) {
      const __m512 sign = _mm512_set1_ps(-0.0f);
      const __m512 k = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
          _mm512_castps_si512(sign), _mm512_castps_si512(r), _mm512_castps_si512(within), 0xCA));
      return VI{_mm512_cvtps_epi32(_mm512_add_ps(k, _mm512_set1_ps(kSignedZeroCode)))};
    } else {
      const __m512i bits = _mm512_castps_si512(x.raw);
      return VI{_mm512_maskz_cvtps_epi32(_mm512_test_epi32_mask(bits, bits), within)};
    }
  }

 private:
  __m512 inverse_;
  __m512i segment0_, segment1_;
  __m512 next0_, next1_, scale_, bias_, last_;
};
#endif  // HWY_AVX3

}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
