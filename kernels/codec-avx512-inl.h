// The 8-bit dynamic map on AVX-512. Segments are found by permutes of 32 entries; with byte
// permutes (VBMI), tables of 256 entries are in registers. codec-inl.h has the forms for every
// instruction set.
#if defined(ORLOP_KERNELS_CODEC_AVX512_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ORLOP_KERNELS_CODEC_AVX512_INL_H_
#undef ORLOP_KERNELS_CODEC_AVX512_INL_H_
#else
#define ORLOP_KERNELS_CODEC_AVX512_INL_H_
#endif

#include <array>

#include "kernels/code_books.h"
#include "kernels/quantize.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace orlop::kernels {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_AVX3_DL
// Four vectors of 32-bit lanes that hold two pairs are packed into 64 bytes, and unpacked, within
// 128 bits: byte 16 l + 4 v + e of the 64 is lane 4 l + e of vector v (0 and 2 even, 1 and 3 odd).
// kBytesToVectors has the index in the block of each such byte; kVectorsToBytes is the inverse.
inline constexpr size_t IndexOfByte(size_t byte) {
  const size_t vector = byte / 4 % 4, lane = byte / 16 * 4 + byte % 4;
  return vector / 2 * 32 + 2 * lane + vector % 2;
}
alignas(64) inline constexpr std::array<uint8_t, 64> kBytesToVectors = [] {
  std::array<uint8_t, 64> order{};
  for (size_t byte = 0; byte < 64; ++byte) order[byte] = static_cast<uint8_t>(IndexOfByte(byte));
  return order;
}();
alignas(64) inline constexpr std::array<uint8_t, 64> kVectorsToBytes = [] {
  std::array<uint8_t, 64> order{};
  for (size_t byte = 0; byte < 64; ++byte) order[IndexOfByte(byte)] = static_cast<uint8_t>(byte);
  return order;
}();

// Looks up one byte of each of 64 entries, where the mask is set. A plane of 256 bytes takes two
// permutes, one for each half.
inline constexpr __mmask64 kAllBytes = ~__mmask64{0};
HWY_INLINE __m512i LookupPlane(const std::array<uint8_t, 128>& plane, __m512i index,
                               __mmask64 mask) {
  return _mm512_maskz_permutex2var_epi8(mask, _mm512_load_si512(plane.data()), index,
                                        _mm512_load_si512(plane.data() + 64));
}
HWY_INLINE __m512i LookupPlane(const std::array<uint8_t, 256>& plane, __m512i index) {
  const uint8_t* table = plane.data();
  const __m512i low =
      _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), index,
                                                _mm512_load_si512(table + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
}

// Returns the entries of 64 codes as four vectors.
template <CodeBook kBook>
HWY_INLINE void DecodeByPermutes(const uint8_t* HWY_RESTRICT codes, VF* entries) {
  using namespace code_book_internal;
  const __m512i c =
      _mm512_permutexvar_epi8(_mm512_load_si512(kBytesToVectors.data()), _mm512_loadu_si512(codes));
  __m512i b[4];
  if constexpr (kBook == CodeBook::kUnsigned) {
    ORLOP_UNROLL
    for (size_t byte = 0; byte < 4; ++byte) b[byte] = LookupPlane(kUnsignedPlanes.plane[byte], c);
  } else {
    const __m512i zero_code = _mm512_set1_epi8(kSignedZeroCode);
    const __m512i k = _mm512_sub_epi8(c, zero_code), magnitude = _mm512_abs_epi8(k);
    const __mmask64 is_some = _mm512_test_epi8_mask(k, k);  // 1.0 is in the table's place of 0
    const __mmask64 is_negative = _mm512_cmplt_epu8_mask(c, zero_code);
    ORLOP_UNROLL
    for (size_t byte = 0; byte < 4; ++byte)
      b[byte] = LookupPlane(kSignedPlanes.plane[byte], magnitude, byte < 2 ? kAllBytes : is_some);
    b[3] = _mm512_mask_add_epi8(b[3], is_negative, b[3], _mm512_set1_epi8(-128));
  }
  const __m512i low01 = _mm512_unpacklo_epi8(b[0], b[1]), high01 = _mm512_unpackhi_epi8(b[0], b[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(b[2], b[3]), high23 = _mm512_unpackhi_epi8(b[2], b[3]);
  entries[0].raw = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23));
  entries[1].raw = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23));
  entries[2].raw = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23));
  entries[3].raw = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23));
}
#endif  // HWY_AVX3_DL

#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
// See codec-inl.h.
class Positions {
 public:
  HWY_INLINE Positions() {}
  HWY_INLINE Positions(CodeBook book, Rounding rounding, float inverse)
      : Positions(book == CodeBook::kSigned       ? code_book_internal::kSignedSegments
                  : rounding == Rounding::kNoZero ? code_book_internal::kNoZeroSegments
                                                  : code_book_internal::kUnsignedSegments,
                  inverse) {}

  template <CodeBook kBook, Rounding kRounding>
  HWY_INLINE VF Of(VF x, VF* r) const {
    r->raw = _mm512_mul_ps(x.raw, inverse_);
    // The larger of |r| and 2^-31.
    const __m512 a = _mm512_range_ps(r->raw, _mm512_set1_ps(0x1p-31f), 0b1011);
    const __m512i exponent = _mm512_srli_epi32(_mm512_castps_si512(a), 23);
    const __mmask16 next =
        _mm512_cmp_ps_mask(a, _mm512_permutex2var_ps(next0_, exponent, next1_), _CMP_GE_OQ);
    const __m512i begin = _mm512_permutex2var_epi32(segment0_, exponent, segment1_);
    const __m512i segment = _mm512_mask_add_epi32(begin, next, begin, _mm512_set1_epi32(1));
    const __m512 position = _mm512_fmadd_ps(a, _mm512_permutexvar_ps(segment, scale_),
                                            _mm512_permutexvar_ps(segment, bias_));
    return VF{_mm512_min_ps(position, _mm512_permutexvar_ps(segment, last_))};
  }

 private:
  HWY_INLINE Positions(const code_book_internal::SegmentTables& tables, float inverse)
      : inverse_(_mm512_set1_ps(inverse)),
        segment0_(_mm512_load_si512(&tables.segment[0])),
        segment1_(_mm512_load_si512(&tables.segment[16])),
        next0_(_mm512_load_ps(&tables.next[0])),
        next1_(_mm512_load_ps(&tables.next[16])),
        scale_(_mm512_load_ps(tables.scale.data())),
        bias_(_mm512_load_ps(tables.bias.data())),
        last_(_mm512_load_ps(tables.last.data())) {}

  __m512 inverse_;
  __m512i segment0_, segment1_;
  __m512 next0_, next1_, scale_, bias_, last_;
};
#endif  // HWY_AVX3

}  // namespace HWY_NAMESPACE
}  // namespace orlop::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
