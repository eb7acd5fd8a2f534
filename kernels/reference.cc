#include "kernels/reference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace orlop::kernels::reference {
namespace {

constexpr uint32_t kCanonicalNaN = 0x7FC00000;
constexpr uint32_t kInfinity = 0x7F800000;

float CanonicalNaN() { return std::bit_cast<float>(kCanonicalNaN); }

float Canonical(float value) { return std::isnan(value) ? CanonicalNaN() : value; }

// What is coded for x: see quantize.h, Special.
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

// Code of the entry nearest to r in [-1, 1], exactly: differences of neighbours are exact in fp64.
uint8_t NearestCode(const std::array<float, 256>& table, float r) {
  const auto above = std::lower_bound(table.begin(), table.end(), r);  // first entry >= r
  if (above == table.begin()) return 0;
  const int upper = static_cast<int>(above - table.begin());
  const double distance_up = static_cast<double>(table[upper]) - r;
  const double distance_down = static_cast<double>(r) - table[upper - 1];
  if (distance_up != distance_down) return distance_up < distance_down ? upper : upper - 1;
  return upper % 2 == 0 ? upper : upper - 1;
}

void QuantizeBlock(CodeBook code_book, Rounding rounding, const float* values, size_t count,
                   uint8_t* codes, float* absmax) {
  *absmax = 0;
  for (size_t i = 0; i < count; ++i) {
    *absmax = std::max(*absmax, std::fabs(Codable(code_book, values[i])));
  }
  for (size_t i = 0; i < count; ++i) codes[i] = Encode(code_book, rounding, values[i], *absmax);
}

// from + (to - from) * (1 - beta), in the form whose error vanishes where the result is near `from`
// or near `to`; beta = 0 gives exactly `to`. This is torch.lerp.
float Lerp(float from, float to, float beta, float one_minus_beta) {
  const float difference = to - from;
  return one_minus_beta < 0.5f ? std::fma(one_minus_beta, difference, from)
                               : std::fma(-beta, difference, to);
}

// One element; returns the new master and updates the moments.
float AdamWElement(const AdamWScalars& s, float gradient, float master, float* exp_avg,
                   float* exp_avg_sq) {
  const float g = gradient * s.gradient_scale;
  const float m = Lerp(*exp_avg, g, s.beta1, s.one_minus_beta1);
  const float v = Lerp(*exp_avg_sq, g * g, s.beta2, s.one_minus_beta2);
  const float denominator = std::fma(std::sqrt(v), s.inverse_sqrt_bias_correction2, s.eps);
  const float change = std::fma(s.decay, master, s.step_size * (m / denominator));
  *exp_avg = Canonical(m);
  *exp_avg_sq = Canonical(v);
  return master - change;
}

// One element; returns the new master and updates the momentum.
float SgdElement(const SgdScalars& s, float gradient, float master, float* momentum_buffer) {
  const float g = std::fma(s.weight_decay, master, gradient * s.gradient_scale);
  float direction = g;
  if (s.momentum != 0) {
    const float b =
        s.first_step ? g : std::fma(s.momentum, *momentum_buffer, s.one_minus_dampening * g);
    direction = s.nesterov ? std::fma(s.momentum, b, g) : b;
    *momentum_buffer = Canonical(b);
  }
  return std::fma(-s.learning_rate, direction, master);
}

void StoreMaster(float value, const MasterSpans& master, size_t i) {
  const SplitValue split = Split(value);
  master.new_weight[i] = split.weight;
  master.remainder[i] = split.remainder;
}

float LoadMaster(const MasterSpans& master, size_t i) {
  return Join(master.weight[i], master.remainder[i]);
}

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

uint8_t Encode(CodeBook code_book, Rounding rounding, float x, float absmax) {
  x = Codable(code_book, x);
  if (x == 0 || absmax == 0) return ZeroCode(code_book);
  const uint8_t code = NearestCode(TableOf(code_book), x / absmax);
  const bool lost = code_book == CodeBook::kUnsigned && code == kUnsignedZeroCode;
  return lost && rounding == Rounding::kNoZero ? 1 : code;
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

void QuantizeBlocks(CodeBook code_book, Rounding rounding, absl::Span<const float> values,
                    absl::Span<uint8_t> codes, absl::Span<float> absmax) {
  for (size_t begin = 0; begin < values.size(); begin += kQuantBlock) {
    const size_t count = std::min(kQuantBlock, values.size() - begin);
    QuantizeBlock(code_book, rounding, &values[begin], count, &codes[begin],
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

void AdamWFp32(const AdamWScalars& scalars, TypedSpan gradient, MasterSpans master,
               AdamWFp32State state) {
  for (size_t i = 0; i < gradient.count; ++i) {
    StoreMaster(AdamWElement(scalars, Load(gradient, i), LoadMaster(master, i), &state.exp_avg[i],
                             &state.exp_avg_sq[i]),
                master, i);
  }
}

void AdamW8Bit(const AdamWScalars& scalars, TypedSpan gradient, MasterSpans master,
               AdamW8BitState state) {
  float exp_avg[kQuantBlock], exp_avg_sq[kQuantBlock];
  for (size_t begin = 0; begin < gradient.count; begin += kQuantBlock) {
    const size_t block = begin / kQuantBlock;
    const size_t count = std::min(kQuantBlock, gradient.count - begin);
    for (size_t i = 0; i < count; ++i) {
      const size_t at = begin + i;
      exp_avg[i] = Decode(CodeBook::kSigned, state.exp_avg[at], state.exp_avg_absmax[block]);
      exp_avg_sq[i] =
          Decode(CodeBook::kUnsigned, state.exp_avg_sq[at], state.exp_avg_sq_absmax[block]);
      StoreMaster(AdamWElement(scalars, Load(gradient, at), LoadMaster(master, at), &exp_avg[i],
                               &exp_avg_sq[i]),
                  master, at);
    }
    QuantizeBlock(CodeBook::kSigned, Rounding::kNearest, exp_avg, count, &state.exp_avg[begin],
                  &state.exp_avg_absmax[block]);
    QuantizeBlock(CodeBook::kUnsigned, state.exp_avg_sq_rounding, exp_avg_sq, count,
                  &state.exp_avg_sq[begin], &state.exp_avg_sq_absmax[block]);
  }
}

void SgdFp32(const SgdScalars& scalars, TypedSpan gradient, MasterSpans master,
             SgdFp32State state) {
  for (size_t i = 0; i < gradient.count; ++i) {
    float* buffer = scalars.momentum != 0 ? &state.momentum_buffer[i] : nullptr;
    StoreMaster(SgdElement(scalars, Load(gradient, i), LoadMaster(master, i), buffer), master, i);
  }
}

void Sgd8Bit(const SgdScalars& scalars, TypedSpan gradient, MasterSpans master,
             Sgd8BitState state) {
  if (scalars.momentum == 0) return reference::SgdFp32(scalars, gradient, master, {});
  float buffer[kQuantBlock];
  for (size_t begin = 0; begin < gradient.count; begin += kQuantBlock) {
    const size_t block = begin / kQuantBlock;
    const size_t count = std::min(kQuantBlock, gradient.count - begin);
    for (size_t i = 0; i < count; ++i) {
      const size_t at = begin + i;
      buffer[i] =
          Decode(CodeBook::kSigned, state.momentum_buffer[at], state.momentum_buffer_absmax[block]);
      StoreMaster(SgdElement(scalars, Load(gradient, at), LoadMaster(master, at), &buffer[i]),
                  master, at);
    }
    QuantizeBlock(CodeBook::kSigned, Rounding::kNearest, buffer, count,
                  &state.momentum_buffer[begin], &state.momentum_buffer_absmax[block]);
  }
}

}  // namespace orlop::kernels::reference
