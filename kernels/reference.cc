#include "kernels/reference.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "absl/types/span.h"
#include "kernels/arithmetic.h"
#include "kernels/casts.h"
#include "kernels/code_books.h"
#include "kernels/code_books4.h"
#include "kernels/quantize.h"
#include "kernels/random.h"
#include "kernels/reduce.h"
#include "kernels/types.h"

namespace orlop::kernels::reference {
namespace {

// Returns the value that is coded for x (quantize.h, Special).
float Codable(CodeBook code_book, float x) {
  if (std::isnan(x)) return 0;
  if (code_book == CodeBook::kUnsigned && x < 0) return 0;
  constexpr float kLargest = std::numeric_limits<float>::max();
  return std::clamp(x, -kLargest, kLargest);
}

const std::array<float, 256>& TableOf(CodeBook code_book) {
  return code_book == CodeBook::kSigned ? kSignedCodeBook : kUnsignedCodeBook;
}

uint8_t ZeroCode(CodeBook code_book) {
  return code_book == CodeBook::kSigned ? kSignedZeroCode : kUnsignedZeroCode;
}

// Returns the code of the entry nearest to r in [-1, 1], exactly: differences of neighbours are
// exact in fp64.
uint8_t NearestCode(const std::array<float, 256>& table, float r) {
  const auto above = std::lower_bound(table.begin(), table.end(), r);  // first entry >= r
  if (above == table.begin()) return 0;
  const int upper = static_cast<int>(above - table.begin());
  const double distance_up = static_cast<double>(table[upper]) - r;
  const double distance_down = static_cast<double>(r) - table[upper - 1];
  if (distance_up != distance_down) return distance_up < distance_down ? upper : upper - 1;
  return upper % 2 == 0 ? upper : upper - 1;
}

// Returns the code of r by kNoZero. r must not be 0 in the unsigned book.
uint8_t NoZeroCode(CodeBook code_book, float r) {
  using namespace code_book_internal;
  const bool is_signed = code_book == CodeBook::kSigned;
  const DecadeTables& decades = is_signed ? kSignedDecades : kUnsignedDecades;
  const float a = std::fabs(r);
  float k = is_signed ? 0 : 2;
  if (a >= (is_signed ? kSignedSmallest : kUnsignedSmallest)) {
    int decade = kDecades;
    while (a < decades.lower_bound[decade]) --decade;
    const float position = std::fma(a, decades.scale[decade], decades.bias[decade]);
    k = std::nearbyint(std::min(position, decades.last[decade]));
  }
  const float code = is_signed ? static_cast<float>(kSignedZeroCode) + std::copysign(k, r) : k - 1;
  return static_cast<uint8_t>(std::clamp(code, 0.0f, 255.0f));
}

// Returns the code of r by kStochastic. k numbers magnitudes as in code_books.h.
uint8_t StochasticCode(CodeBook code_book, float r, float unit) {
  using namespace code_book_internal;
  const bool is_signed = code_book == CodeBook::kSigned;
  const StochasticTables& tables = is_signed ? kSignedStochastic : kUnsignedStochastic;
  const DecadeTables& decades = is_signed ? kSignedDecades : kUnsignedDecades;
  const float zero_k = is_signed ? 0 : 1;
  const float a = std::fabs(r);
  int decade = kDecades;
  while (decade > 0 && a < tables.first_value[decade]) --decade;
  float p = std::fma(a, decades.scale[decade], decades.bias[decade]);
  const float last = decades.last[decade];
  if (p > last) p = std::min(std::fma(p - last, tables.beyond[decade], last), last + 1);
  const float smallest = TableOf(code_book)[is_signed ? kSignedZeroCode + 1 : 1];
  if (a < smallest) p = std::fma(a, tables.inverse_smallest, zero_k);
  // Near 1, adding `unit` may round the sum for the last entry up to the next number.
  const float k = std::floor(p + unit);
  const float code =
      is_signed ? static_cast<float>(kSignedZeroCode) + std::copysign(k, r) : std::max(k, 2.0f) - 1;
  return static_cast<uint8_t>(std::clamp(code, 0.0f, 255.0f));
}

// The factor for x and absmax, and 1 / absmax (quantize.h, Encode).
struct Scale {
  explicit Scale(float absmax)
      : before(quantize_internal::ScaleOf(absmax)),
        inverse(absmax == 0 ? 0 : 1 / (absmax * before)) {}
  float before, inverse;
};

}  // namespace

float BF16ToF32(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

float F16ToF32(uint16_t bits) {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  if (exponent == 31) {
    return mantissa != 0 ? CanonicalNaN() : sign * std::numeric_limits<float>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}

uint16_t F32ToBF16(float value) {
  if (std::isnan(value)) return 0x7FC0;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t odd = (bits >> 16) & 1;  // ties to even
  return static_cast<uint16_t>((bits + 0x7FFF + odd) >> 16);
}

uint16_t F32ToF16(float value) {
  if (std::isnan(value)) return 0x7E00;
  const float magnitude = std::fabs(value);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (magnitude >= 65520.0f) return sign | 0x7C00;  // half a step above the largest
  if (magnitude < 0x1p-14f) {                       // subnormal: whole multiples of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  }
  const uint32_t bits = std::bit_cast<uint32_t>(magnitude);
  const uint32_t odd = (bits >> 13) & 1;
  const uint32_t rounded = (bits + 0xFFF + odd) >> 13;
  return sign | static_cast<uint16_t>(rounded - (112 << 10));  // exponent bias 127 to 15
}

SplitValue Split(float master) {
  if (std::isnan(master)) return {0x7FC0, 0};
  const uint32_t bits = std::bit_cast<uint32_t>(master);
  const uint32_t weight = (bits + 0x8000) >> 16;
  return {static_cast<uint16_t>(weight), static_cast<int16_t>(bits - (weight << 16))};
}

float Join(uint16_t weight, int16_t remainder) {
  const uint32_t high = static_cast<uint32_t>(weight) << 16;
  return std::bit_cast<float>(high + static_cast<uint32_t>(static_cast<int32_t>(remainder)));
}

float Load(TypedSpan span, size_t i) {
  const char* at = static_cast<const char*>(span.data) + i * SizeOf(span.dtype);
  if (span.dtype == DType::kF32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return span.dtype == DType::kBF16 ? BF16ToF32(bits) : F16ToF32(bits);
}

uint8_t Encode(CodeBook code_book, Rounding rounding, float x, float absmax, float unit) {
  const Scale scale(absmax);
  x = Codable(code_book, x);
  const bool is_signed = code_book == CodeBook::kSigned;
  if (absmax == 0 || (x == 0 && !is_signed)) return ZeroCode(code_book);
  const float r = x * scale.before * scale.inverse;
  if (rounding == Rounding::kStochastic) return StochasticCode(code_book, r, unit);
  if (rounding == Rounding::kNoZero) return NoZeroCode(code_book, r);
  const uint8_t code = NearestCode(TableOf(code_book), r);
  return is_signed && code == kSignedZeroCode && std::signbit(x) ? code - 1 : code;
}

uint8_t Encode4(CodeBook code_book, Rounding rounding, float x, float absmax, float unit) {
  const Scale scale(absmax);
  const float r = Codable(code_book, x) * scale.before * scale.inverse;
  const bool stochastic = rounding == Rounding::kStochastic;
  if (code_book == CodeBook::kUnsigned) {
    const float position = r * 16;
    const float k = stochastic ? std::floor(position + unit) : std::nearbyint(position);
    return static_cast<uint8_t>(std::clamp(k - 1, 0.0f, 15.0f));
  }
  int code = 15;
  if (!stochastic) {
    while (r < kSigned4Thresholds[code]) --code;
    return static_cast<uint8_t>(code);
  }
  while (code > 0 && r < kSigned4CodeBook[code]) --code;
  const bool up = unit < (r - kSigned4CodeBook[code]) * kSigned4InverseGaps[code];
  return static_cast<uint8_t>(code + up);
}

float Decode4(CodeBook code_book, uint8_t code, float absmax) {
  return (code_book == CodeBook::kSigned ? kSigned4CodeBook : kUnsigned4CodeBook)[code] * absmax;
}

float AbsmaxOf(CodeBook code_book, absl::Span<const float> values) {
  float absmax = 0;
  for (const float value : values) absmax = std::max(absmax, std::fabs(Codable(code_book, value)));
  return absmax;
}

float Decode(CodeBook code_book, uint8_t code, float absmax) {
  return TableOf(code_book)[code] * absmax;
}

void WidenToF32(TypedSpan source, absl::Span<float> destination) {
  for (size_t i = 0; i < source.count; ++i) destination[i] = Load(source, i);
}

void RoundToBF16(absl::Span<const float> source, absl::Span<uint16_t> destination) {
  for (size_t i = 0; i < source.size(); ++i) destination[i] = F32ToBF16(source[i]);
}

void RoundToF16(absl::Span<const float> source, absl::Span<uint16_t> destination) {
  for (size_t i = 0; i < source.size(); ++i) destination[i] = F32ToF16(source[i]);
}

void SplitMaster(absl::Span<const float> master, absl::Span<uint16_t> weight,
                 absl::Span<int16_t> remainder) {
  for (size_t i = 0; i < master.size(); ++i) {
    const SplitValue split = Split(master[i]);
    weight[i] = split.weight;
    remainder[i] = split.remainder;
  }
}

void JoinMaster(absl::Span<const uint16_t> weight, absl::Span<const int16_t> remainder,
                absl::Span<float> master) {
  for (size_t i = 0; i < weight.size(); ++i) master[i] = Join(weight[i], remainder[i]);
}

void JoinMasterToF16(absl::Span<const uint16_t> weight, absl::Span<const int16_t> remainder,
                     absl::Span<uint16_t> destination, F16Overflow* overflow) {
  *overflow = {};
  for (size_t i = 0; i < weight.size(); ++i) {
    const float master = Join(weight[i], remainder[i]);
    destination[i] = F32ToF16(master);
    if (std::fabs(master) > kLargestF16 && overflow->count++ == 0) overflow->first_index = i;
  }
}

void QuantizeBlock(CodeBook code_book, Rounding rounding, const float* values, size_t count,
                   BlockRandom random, uint8_t* codes, float* absmax) {
  *absmax = AbsmaxOf(code_book, {values, count});
  for (size_t i = 0; i < count; ++i) {
    const float unit = RandomUnit(random, static_cast<uint32_t>(i));
    codes[i] = Encode(code_book, rounding, values[i], *absmax, unit);
  }
}

void QuantizeBlocks(CodeBook code_book, Rounding rounding, absl::Span<const float> values,
                    absl::Span<uint8_t> codes, absl::Span<float> absmax) {
  for (size_t begin = 0; begin < values.size(); begin += kQuantBlock) {
    const size_t count = std::min(kQuantBlock, values.size() - begin);
    QuantizeBlock(code_book, Deterministic(rounding), &values[begin], count, {}, &codes[begin],
                  &absmax[begin / kQuantBlock]);
  }
}

void DequantizeBlocks(CodeBook code_book, absl::Span<const uint8_t> codes,
                      absl::Span<const float> absmax, absl::Span<float> values) {
  for (size_t i = 0; i < codes.size(); ++i) {
    values[i] = Decode(code_book, codes[i], absmax[i / kQuantBlock]);
  }
}

BlockSums ReduceBlock(TypedSpan block) {
  BlockSums sums;
  double lane[16] = {};
  for (size_t i = 0; i < block.count; ++i) {
    const double x = Load(block, i);
    if (std::isfinite(x)) {
      lane[i % 16] = std::fma(x, x, lane[i % 16]);
    } else {
      ++sums.nonfinite_count;
    }
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  sums.sum_squares = lane[0];
  return sums;
}

void ReduceGradient(TypedSpan gradient, BlockSums* sums) {
  for (size_t begin = 0; begin < gradient.count; begin += kQuantBlock) {
    const BlockSums block = ReduceBlock(Slice(gradient, begin, kQuantBlock));
    sums->sum_squares += block.sum_squares;
    sums->nonfinite_count += block.nonfinite_count;
  }
}

void CopyAndReduce(void* destination, TypedSpan gradient, BlockSums* sums) {
  if (gradient.count > 0) {
    std::memcpy(destination, gradient.data, gradient.count * SizeOf(gradient.dtype));
  }
  reference::ReduceGradient({gradient.dtype, destination, gradient.count}, sums);
}

void AccumulateToF32(TypedSpan contribution, absl::Span<float> accumulator) {
  for (size_t i = 0; i < contribution.count; ++i) {
    accumulator[i] = Canonical(accumulator[i] + Load(contribution, i));
  }
}

}  // namespace orlop::kernels::reference
