// The conversions of one element by one CUDA thread: gradients, masters, 8-bit and 4-bit codes,
// with the bits of reference.cc. quantize.h, casts.h and code_books.h define what they compute.
//
// nvcc compiles these functions for the device; a C++ compiler compiles them for the tests on the
// host.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/code_books4.h"
#include "kernels/optimizer.h"
#include "kernels/random.h"

#ifdef __CUDACC__
#define ORLOP_BLOCK __device__ __forceinline__
#else
#define ORLOP_BLOCK inline
#endif

namespace orlop::kernels::cuda {

// ---- Tables ----

// Indexed by the low five bits of a magnitude's exponent: the segment of the book where its binade
// begins, and the value inside the binade where the next segment begins, if any. Magnitudes below
// 2^-31 must first be raised to it.
struct Binade {
  float next;
  int32_t segment;  // 0: below all; 1..7: decades; 8: 1.0
};
// k (code_books.h) is magnitude * scale + bias, at most `last`. `beyond`: see StochasticTables.
struct alignas(16) Segment {
  float scale, bias, last, beyond;
};
struct BookTables {
  float value[256];
  // Smallest magnitude whose nearest entry has number k, for k up to 256.
  float bound[260];
  Binade nearest[32], stochastic[32];
  Segment nearest_segments[9], stochastic_segments[9];
};
struct Tables {
  BookTables signed_book, unsigned_book;
  float signed4[16], unsigned4[16], thresholds4[16], inverse_gaps4[16];
};

namespace codec_internal {

// begins[i] is where segment i + 1 begins.
constexpr void SetBinades(const float* begins, Binade* binades) {
  for (int exponent = 0; exponent < 32; ++exponent) {
    const float binade = std::bit_cast<float>(static_cast<uint32_t>(96 + exponent) << 23);
    binades[exponent] = {4, 0};
    for (int i = 0; i <= kDecades; ++i) {
      if (begins[i] <= binade) ++binades[exponent].segment;
      if (begins[i] > binade && begins[i] < 2 * binade) binades[exponent].next = begins[i];
    }
  }
}

constexpr BookTables MakeBook(bool is_signed) {
  using namespace code_book_internal;
  const std::array<float, 256> book = MakeCodeBook(is_signed);
  const std::array<float, 8> bounds = MakeLowerBounds(is_signed);
  const DecadeTables decades = MakeDecadeTables(is_signed);
  const StochasticTables stochastic = MakeStochasticTables(is_signed);
  const int zero_k = is_signed ? 0 : 1, code_of_zero_k = is_signed ? kSignedZeroCode : 0;
  BookTables tables{};
  for (int code = 0; code < 256; ++code) tables.value[code] = book[code];
  for (int code = code_of_zero_k + 1; code < 256; ++code) {
    tables.bound[code - code_of_zero_k + zero_k] = LowerBound(book, code);
  }
  float first_values[8] = {book[code_of_zero_k + 1]};
  for (int i = 1; i <= kDecades; ++i) first_values[i] = stochastic.first_value[i];
  SetBinades(bounds.data(), tables.nearest);
  SetBinades(first_values, tables.stochastic);
  const float zero = static_cast<float>(zero_k);
  tables.nearest_segments[0] = {0, zero, zero, 0};
  tables.stochastic_segments[0] = {stochastic.inverse_smallest, zero, FLT_MAX, 0};
  for (int i = 0; i <= kDecades; ++i) {
    tables.nearest_segments[i + 1] = tables.stochastic_segments[i + 1] = {
        decades.scale[i], decades.bias[i], decades.last[i], stochastic.beyond[i]};
  }
  return tables;
}

constexpr Tables MakeTables() {
  Tables tables{MakeBook(true), MakeBook(false), {}, {}, {}, {}};
  for (int i = 0; i < 16; ++i) {
    tables.signed4[i] = kSigned4CodeBook[i];
    tables.unsigned4[i] = kUnsigned4CodeBook[i];
    tables.thresholds4[i] = kSigned4Thresholds[i];
    tables.inverse_gaps4[i] = kSigned4InverseGaps[i];
  }
  return tables;
}

// Compares the tables that different compilers computed.
constexpr uint64_t DigestOf(const Tables& tables) {
  uint64_t digest = 0;
  for (const uint32_t word : std::bit_cast<std::array<uint32_t, sizeof(Tables) / 4>>(tables)) {
    digest = (digest ^ word) * 0x9e3779b97f4a7c15u;
  }
  return digest;
}
static_assert(DigestOf(MakeTables()) == 0x5baea9672a7cbbe4u);

// The tables are in global memory and read through the L1 cache: lanes look up different entries,
// which __constant__ memory would serve one by one.
#ifdef __CUDACC__
__device__ const Tables kTables = MakeTables();
#else
inline constexpr Tables kTables = MakeTables();
#endif

}  // namespace codec_internal

template <CodeBook kBook>
ORLOP_BLOCK const BookTables& TablesOf() {
  return kBook == CodeBook::kSigned ? codec_internal::kTables.signed_book
                                    : codec_internal::kTables.unsigned_book;
}

ORLOP_BLOCK uint32_t BitsOf(float value) { return __builtin_bit_cast(uint32_t, value); }
ORLOP_BLOCK float FloatOf(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// ---- Gradients ----

ORLOP_BLOCK float WidenF16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7FFF;
  if (magnitude > 0x7C00) return CanonicalNaN();
  if (magnitude == 0x7C00) return FloatOf(sign | 0x7F800000);
  // The exponent's bias changes from 15 to 127. A subnormal half becomes a subnormal fp32 on the
  // way.
  return FloatOf(sign | BitsOf(FloatOf(magnitude << 13) * 0x1p112f));
}

ORLOP_BLOCK float LoadGradient(DType dtype, const void* gradient, uint64_t i) {
  if (dtype == DType::kF32) return static_cast<const float*>(gradient)[i];
  const uint16_t bits = static_cast<const uint16_t*>(gradient)[i];
  return dtype == DType::kBF16 ? FloatOf(static_cast<uint32_t>(bits) << 16) : WidenF16(bits);
}

// ---- Masters ----

ORLOP_BLOCK float LoadMaster(MasterFormat format, const uint16_t* weight, const void* remainder,
                             uint64_t i) {
  const uint32_t high = static_cast<uint32_t>(weight[i]) << 16;
  int32_t low = 0;
  if (format == MasterFormat::kExact) low = static_cast<const int16_t*>(remainder)[i];
  if (format == MasterFormat::k24Bit) low = static_cast<const int8_t*>(remainder)[i] * 256;
  return FloatOf(high + static_cast<uint32_t>(low));
}

// random_bits: the random number for rounding k24Bit and kBF16Only.
ORLOP_BLOCK void StoreMaster(MasterFormat format, float master, uint32_t random_bits,
                             uint16_t* weight, void* remainder, uint64_t i) {
  uint32_t bits = BitsOf(Canonical(master));
  const bool is_finite = (bits & 0x7F800000) != 0x7F800000;
  if (format == MasterFormat::k24Bit && is_finite) bits += random_bits >> 24;
  if (format == MasterFormat::kBF16Only && is_finite) bits += random_bits >> 16;
  const uint32_t half = format == MasterFormat::kBF16Only ? 0 : 0x8000;
  weight[i] = static_cast<uint16_t>((bits + half) >> 16);
  if (format == MasterFormat::kExact) {
    // A canonical NaN has no low bits.
    static_cast<int16_t*>(remainder)[i] = static_cast<int16_t>(bits);
  } else if (format == MasterFormat::k24Bit) {
    static_cast<int8_t*>(remainder)[i] = static_cast<int8_t>(bits >> 8);
  }
}

// ---- Codes ----

// Returns the value that is coded for x (quantize.h, Special).
template <CodeBook kBook>
ORLOP_BLOCK float Codable(float x) {
  if (!(x == x) || (kBook == CodeBook::kUnsigned && x < 0)) return 0;
  return x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x;
}

// Returns codable x divided by absmax, which must not be 0.
ORLOP_BLOCK float Ratio(float x, float absmax) {
  const float before = quantize_internal::ScaleOf(absmax);
  return x * before * (1.0f / (absmax * before));
}

ORLOP_BLOCK const Segment& SegmentOf(const Binade* binades, const Segment* segments, float a) {
  if (a < 0x1p-31f) a = 0x1p-31f;
  const Binade binade = binades[BitsOf(a) >> 23 & 31];
  return segments[binade.segment + (a >= binade.next ? 1 : 0)];
}

// Returns the number k of the entry whose magnitude is nearest to a. Near ties `exactly` chooses
// the rule: kNearest if true, kNoZero if false.
ORLOP_BLOCK uint32_t NearestNumber(const BookTables& tables, float a, bool exactly) {
  const Segment segment = SegmentOf(tables.nearest, tables.nearest_segments, a);
  float position = fmaf(a, segment.scale, segment.bias);
  if (position > segment.last) position = segment.last;
  constexpr float kWhole = 0x1.8p23f;  // adding it rounds to an integer, ties to even
  const float shifted = position + kWhole;
  const uint32_t k = BitsOf(shifted) & 0x1FF;
  // The error of `position` is less than 5e-5 (map-inl.h), so k can be off by one only this near to
  // a tie.
  const float nearest = shifted - kWhole, difference = position - nearest;
  if (!exactly || fabsf(difference) <= 0.5f - 0x1p-14f) return k;
  const uint32_t upper = difference > 0 ? k + 1 : k;
  return a >= tables.bound[upper] ? upper : upper - 1;
}

ORLOP_BLOCK uint32_t StochasticNumber(const BookTables& tables, float a, float unit) {
  const Segment segment = SegmentOf(tables.stochastic, tables.stochastic_segments, a);
  float position = fmaf(a, segment.scale, segment.bias);
  if (position > segment.last) {
    const float beyond = fmaf(position - segment.last, segment.beyond, segment.last);
    position = beyond < segment.last + 1 ? beyond : segment.last + 1;
  }
  return static_cast<uint32_t>(position + unit);
}

template <CodeBook kBook>
ORLOP_BLOCK uint32_t Encode8(Rounding rounding, float x, float absmax, float unit) {
  constexpr bool kIsSigned = kBook == CodeBook::kSigned;
  x = Codable<kBook>(x);
  if (absmax == 0 || (!kIsSigned && x == 0)) return kIsSigned ? kSignedZeroCode : 0;
  const float r = Ratio(x, absmax);
  const bool stochastic = rounding == Rounding::kStochastic;
  const uint32_t k =
      stochastic ? StochasticNumber(TablesOf<kBook>(), fabsf(r), unit)
                 : NearestNumber(TablesOf<kBook>(), fabsf(r), rounding == Rounding::kNearest);
  if (!kIsSigned) {
    const uint32_t least = rounding == Rounding::kNearest ? 1 : 2;
    const uint32_t code = (k > least ? k : least) - 1;
    return code < 255 ? code : 255;
  }
  if (BitsOf(x) >> 31 == 0) return kSignedZeroCode + k < 255 ? kSignedZeroCode + k : 255;
  if (k == 0) return rounding == Rounding::kNearest ? kSignedZeroCode - 1 : kSignedZeroCode;
  return k < kSignedZeroCode ? kSignedZeroCode - k : 0;
}

// Returns how many of 15 ascending thresholds, from the second entry on, r reaches.
ORLOP_BLOCK uint32_t CountReached(const float* thresholds, float r) {
  uint32_t code = 0;
  for (uint32_t half = 8; half > 0; half /= 2) {
    if (r >= thresholds[code + half]) code += half;
  }
  return code;
}

template <CodeBook kBook>
ORLOP_BLOCK uint32_t Encode4(Rounding rounding, float x, float absmax, float unit) {
  const Tables& tables = codec_internal::kTables;
  const float r = absmax == 0 ? 0 : Ratio(Codable<kBook>(x), absmax);
  const bool stochastic = rounding == Rounding::kStochastic;
  if (kBook == CodeBook::kUnsigned) {
    const float position = r * 16;
    const float k = stochastic ? floorf(position + unit) : rintf(position);
    return k < 1 ? 0 : k > 16 ? 15 : static_cast<uint32_t>(k) - 1;
  }
  if (!stochastic) return CountReached(tables.thresholds4, r);
  const uint32_t code = CountReached(tables.signed4, r);
  return code + (unit < (r - tables.signed4[code]) * tables.inverse_gaps4[code] ? 1 : 0);
}

template <CodeBook kBook>
ORLOP_BLOCK float Decode8(uint32_t code, float absmax) {
  return TablesOf<kBook>().value[code] * absmax;
}
template <CodeBook kBook>
ORLOP_BLOCK float Decode4(uint32_t code, float absmax) {
  const Tables& tables = codec_internal::kTables;
  return (kBook == CodeBook::kSigned ? tables.signed4 : tables.unsigned4)[code] * absmax;
}

}  // namespace orlop::kernels::cuda
