// The dynamic-map code books as constants, computed by the compiler from their closed form.
//
// Both books number their magnitudes with one number k, chosen so that float(k) has the decade in
// its exponent and the position within the decade in its mantissa:
//
//   k = n + j,  n = 2^decade (signed) or 2^(decade + 1) (unsigned),  j = 0..n - 1
//   value(k) = (0.1 + 0.9 (j + 0.5) / n) * 10^(decade - 6)
//            = (18 k + 9 - 16 n) / (20 n * 10^(6 - decade))
//
// Numerator and denominator are integers that fp32 holds exactly (the denominator is 2^p * 5^q with
// 5^q < 2^24), so one IEEE division gives the fp32 nearest to the closed form.
//
//   signed    code = 127 + k or 127 - k; k = 0 is zero; k = 128 is 1.0 and has no negative twin
//   unsigned  code = k - 1;              k = 1 is zero; k = 256 is 1.0
//
// In both books an even code means an odd k.
#pragma once
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace orlop::kernels {

inline constexpr int kDecades = 7;
inline constexpr uint8_t kSignedZeroCode = 127;
inline constexpr uint8_t kUnsignedZeroCode = 0;

namespace code_book_internal {

// Returns n of a decade 0..6: the number of its magnitudes, and also its first k.
constexpr int DecadeSize(bool is_signed, int decade) {
  return is_signed ? 1 << decade : 2 << decade;
}

constexpr float Denominator(bool is_signed, int decade) {
  int64_t denominator = int64_t{20} * DecadeSize(is_signed, decade);
  for (int i = decade; i < 6; ++i) denominator *= 10;
  return static_cast<float>(denominator);
}

// Returns the number that is added to 18 k to give the numerator.
constexpr float Offset(bool is_signed, int decade) {
  return static_cast<float>(9 - 16 * DecadeSize(is_signed, decade));
}

constexpr float Magnitude(bool is_signed, int decade, int k) {
  return (18.0f * static_cast<float>(k) + Offset(is_signed, decade)) /
         Denominator(is_signed, decade);
}

constexpr std::array<float, 256> MakeCodeBook(bool is_signed) {
  std::array<float, 256> book{};  // leaves the zero code at 0
  book[255] = 1;
  for (int decade = 0; decade < kDecades; ++decade) {
    const int n = DecadeSize(is_signed, decade);
    for (int k = n; k < 2 * n; ++k) {
      const float value = Magnitude(is_signed, decade, k);
      book[is_signed ? kSignedZeroCode + k : k - 1] = value;
      if (is_signed) book[kSignedZeroCode - k] = -value;
    }
  }
  return book;
}

// Returns the smallest positive fp32 that is coded as `upper_code` rather than the code below it.
// It is the exact middle of the two values if that is an fp32 and a tie is rounded up, else the
// next fp32 above the middle.
constexpr float LowerBound(const std::array<float, 256>& book, int upper_code) {
  const double middle = (static_cast<double>(book[upper_code - 1]) + book[upper_code]) / 2;
  const float nearest = static_cast<float>(middle);
  const bool tie_goes_up = upper_code % 2 == 0;
  if (nearest > middle || (nearest == middle && tie_goes_up)) return nearest;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(nearest) + 1);
}

// lower_bound[d], d = 0..6, is where decade d begins (below decade 0: zero); lower_bound[7] is
// where 1.0 begins.
constexpr std::array<float, 8> MakeLowerBounds(bool is_signed) {
  const std::array<float, 256> book = MakeCodeBook(is_signed);
  std::array<float, 8> bounds{};
  for (int decade = 0; decade < kDecades; ++decade) {
    const int n = DecadeSize(is_signed, decade);
    bounds[decade] = LowerBound(book, is_signed ? kSignedZeroCode + n : n - 1);
  }
  bounds[7] = LowerBound(book, 255);
  return bounds;
}

// Small tables for vector decoding, indexed by the low three bits of float(k)'s exponent field. The
// entries are repeated so that 16 lanes can be loaded.
struct SlotTables {
  alignas(64) std::array<float, 16> denominator{};
  alignas(64) std::array<float, 16> reciprocal{};
  alignas(64) std::array<float, 16> offset{};
};

constexpr int Slot(int k) {
  return static_cast<int>(std::bit_cast<uint32_t>(static_cast<float>(k)) >> 23) & 7;
}

constexpr void SetSlot(SlotTables& tables, int slot, float offset, float denominator) {
  for (int i = slot; i < 16; i += 8) {
    tables.offset[i] = offset;
    tables.denominator[i] = denominator;
    tables.reciprocal[i] = 1 / denominator;
  }
}

// The seven decades occupy seven slots. The eighth gives 1.0 (and, in the unsigned book, zero,
// because k = 1 and 256 share a slot): 18 * 128 / 2304 = 1; 18 * 1 - 18 = 0 and (18 * 256 - 18) /
// 4590 = 1.
constexpr SlotTables MakeSlotTables(bool is_signed) {
  SlotTables tables;
  for (int decade = 0; decade < kDecades; ++decade) {
    SetSlot(tables, Slot(DecadeSize(is_signed, decade)), Offset(is_signed, decade),
            Denominator(is_signed, decade));
  }
  if (is_signed) {
    SetSlot(tables, Slot(128), 0, 2304);
  } else {
    SetSlot(tables, Slot(256), -18, 4590);
  }
  return tables;
}

// Small tables for vector encoding, indexed by decade 0..6, and 7 for 1.0; repeated for 16 lanes.
// Within a decade k is magnitude * scale + bias, rounded, at most `last`. No lower limit is needed,
// because the range that rounds to a decade begins 0.3 below its first k.
struct DecadeTables {
  // Entry 0 is 0, because no decade is below.
  alignas(64) std::array<float, 16> lower_bound{};
  alignas(64) std::array<float, 16> scale{};
  alignas(64) std::array<float, 16> bias{};
  alignas(64) std::array<float, 16> last{};
};

constexpr DecadeTables MakeDecadeTables(bool is_signed) {
  const std::array<float, 8> lower_bounds = MakeLowerBounds(is_signed);
  DecadeTables tables;
  for (int i = 0; i < 16; ++i) {
    const int decade = i % 8;
    const bool is_one = decade == kDecades;
    const float first = static_cast<float>(DecadeSize(is_signed, decade));
    tables.last[i] = is_one ? first : 2 * first - 1;
    tables.lower_bound[i] = decade == 0 ? 0 : lower_bounds[decade];
    tables.scale[i] = is_one ? 0 : static_cast<float>(Denominator(is_signed, decade) / 18.0);
    tables.bias[i] = is_one ? first : static_cast<float>(-Offset(is_signed, decade) / 18.0);
  }
  return tables;
}

// Segments for vectors of 32 entries: 0 holds the magnitudes that have no code of their own, 1..7
// are decades 0..6, 8 is 1.0. Indexed by the low five bits of a magnitude's exponent: the segment
// where its binade begins, and the value inside the binade where the next segment begins, if any.
// Magnitudes below 2^-31 must first be raised to it.
struct SegmentTables {
  alignas(64) std::array<int32_t, 32> segment{};
  alignas(64) std::array<float, 32> next{};
  // By segment: k is magnitude * scale + bias, rounded, at most `last`.
  alignas(64) std::array<float, 16> scale{}, bias{}, last{};
};

// zero_k: the number k for magnitudes below the first range.
constexpr SegmentTables MakeSegmentTables(bool is_signed, float zero_k) {
  const std::array<float, 8> begins = MakeLowerBounds(is_signed);
  const DecadeTables decades = MakeDecadeTables(is_signed);
  SegmentTables tables;
  for (int exponent = 0; exponent < 32; ++exponent) {
    const float binade = std::bit_cast<float>(static_cast<uint32_t>(96 + exponent) << 23);
    tables.next[exponent] = 4;
    for (const float begin : begins) {
      if (begin <= binade) ++tables.segment[exponent];
      if (begin > binade && begin < 2 * binade) tables.next[exponent] = begin;
    }
  }
  tables.bias[0] = tables.last[0] = zero_k;
  for (int i = 0; i <= kDecades; ++i) {
    tables.scale[i + 1] = decades.scale[i];
    tables.bias[i + 1] = decades.bias[i];
    tables.last[i + 1] = decades.last[i];
  }
  return tables;
}

// Stochastic rounding goes up to the next entry with a probability that is linear between the two.
// k grows linearly within a decade. The gap between its last entry and the first of the next decade
// is another one: `beyond` gaps of this decade make 1 there.
struct StochasticTables {
  // Where a decade begins; entry 0 is 0.
  alignas(64) std::array<float, 16> first_value{};
  alignas(64) std::array<float, 16> beyond{};
  float inverse_smallest = 0;  // 1 / the smallest positive entry
};

constexpr StochasticTables MakeStochasticTables(bool is_signed) {
  const std::array<float, 256> book = MakeCodeBook(is_signed);
  StochasticTables tables;
  for (int i = 0; i < 16; ++i) {
    const int decade = i % 8;
    const int n = DecadeSize(is_signed, decade);
    tables.first_value[i] = decade == 0          ? 0
                            : decade == kDecades ? 1
                                                 : book[is_signed ? kSignedZeroCode + n : n - 1];
    tables.beyond[i] = decade == kDecades - 1 ? 2 : 1 / 3.0f;
  }
  tables.inverse_smallest = 1 / book[is_signed ? kSignedZeroCode + 1 : 1];
  return tables;
}

// The four bytes of every entry, for byte permutes. For the signed book: the magnitudes by k, with
// 1.0 (k = 128) in the place of 0, so that seven bits of k are an index; the lower two bytes of 1.0
// are 0.
template <size_t kSize>
struct BytePlanes {
  alignas(64) std::array<std::array<uint8_t, kSize>, 4> plane{};
};

template <size_t kSize>
constexpr BytePlanes<kSize> MakeBytePlanes(const std::array<float, kSize>& entries) {
  BytePlanes<kSize> planes;
  for (size_t i = 0; i < kSize; ++i) {
    for (int byte = 0; byte < 4; ++byte) {
      planes.plane[byte][i] =
          static_cast<uint8_t>(std::bit_cast<uint32_t>(entries[i]) >> (8 * byte));
    }
  }
  return planes;
}

constexpr std::array<float, 128> MakeMagnitudes() {
  const std::array<float, 256> book = MakeCodeBook(true);
  std::array<float, 128> magnitudes{1};
  for (int k = 1; k < 128; ++k) magnitudes[k] = book[kSignedZeroCode + k];
  return magnitudes;
}

inline constexpr SlotTables kSignedSlots = MakeSlotTables(true);
inline constexpr SlotTables kUnsignedSlots = MakeSlotTables(false);
inline constexpr DecadeTables kSignedDecades = MakeDecadeTables(true);
inline constexpr DecadeTables kUnsignedDecades = MakeDecadeTables(false);
inline constexpr StochasticTables kSignedStochastic = MakeStochasticTables(true);
inline constexpr StochasticTables kUnsignedStochastic = MakeStochasticTables(false);
inline constexpr SegmentTables kSignedSegments = MakeSegmentTables(true, 0);
inline constexpr SegmentTables kUnsignedSegments = MakeSegmentTables(false, 1);
inline constexpr SegmentTables kNoZeroSegments = MakeSegmentTables(false, 2);
inline constexpr BytePlanes<128> kSignedPlanes = MakeBytePlanes(MakeMagnitudes());
inline constexpr BytePlanes<256> kUnsignedPlanes = MakeBytePlanes(MakeCodeBook(false));
// Magnitudes below these are nearest to zero.
inline constexpr float kSignedSmallest = MakeLowerBounds(true)[0];
inline constexpr float kUnsignedSmallest = MakeLowerBounds(false)[0];

}  // namespace code_book_internal

// Both are ascending and end in 1.0 at code 255. Signed: 0 is code 127. Unsigned: 0 is code 0.
inline constexpr std::array<float, 256> kSignedCodeBook = code_book_internal::MakeCodeBook(true);
inline constexpr std::array<float, 256> kUnsignedCodeBook = code_book_internal::MakeCodeBook(false);

}  // namespace orlop::kernels
