#include "kernels/casts.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/reference.h"
#include "kernels/testing/test_data.h"
#include "kernels/types.h"

namespace orlop::kernels {
namespace {

using testing::BitsOf;
using testing::FloatOf;
using testing::ForEachTarget;
using ::testing::HasSubstr;
using testing::SameBits;
using testing::Source;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Parts {
  std::vector<uint16_t> weight;
  std::vector<int16_t> remainder;
};

Parts Split(const std::vector<float>& master) {
  Parts parts{std::vector<uint16_t>(master.size()), std::vector<int16_t>(master.size())};
  EXPECT_TRUE(
      SplitMaster(master, absl::MakeSpan(parts.weight), absl::MakeSpan(parts.remainder)).ok());
  return parts;
}

std::vector<float> Join(const Parts& parts) {
  std::vector<float> master(parts.weight.size());
  EXPECT_TRUE(JoinMaster(parts.weight, parts.remainder, absl::MakeSpan(master)).ok());
  return master;
}

// Returns every upper half with the lower halves at which rounding changes.
std::vector<float> TurningPoints() {
  std::vector<float> values;
  for (uint32_t high = 0; high < 0x10000; ++high) {
    for (const uint32_t low : {0u, 1u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
      values.push_back(FloatOf(high << 16 | low));
    }
  }
  return values;
}

TEST(Master, ComesBackBitForBitAndItsWeightIsBFloat16) {
  ForEachTarget([] {
    const std::vector<float> master = TurningPoints();
    const Parts parts = Split(master);
    const std::vector<float> joined = Join(parts);
    for (size_t i = 0; i < master.size(); ++i) {
      if (std::isnan(master[i])) {
        ASSERT_EQ(parts.weight[i], 0x7FC0) << i;
        ASSERT_EQ(parts.remainder[i], 0) << i;
        continue;
      }
      ASSERT_EQ(BitsOf(joined[i]), BitsOf(master[i])) << i;
      const bool tie = (BitsOf(master[i]) & 0xFFFF) == 0x8000;
      const uint16_t away = static_cast<uint16_t>((BitsOf(master[i]) >> 16) + 1);
      ASSERT_EQ(parts.weight[i], tie ? away : reference::F32ToBF16(master[i])) << i;
    }
  });
}

TEST(Master, KeepsFiniteValuesWhoseWeightIsInfinite) {
  ForEachTarget([] {
    const float largest = std::numeric_limits<float>::max();
    const Parts parts = Split({largest, -largest, FloatOf(0x7F7F7FFF), kInfinity, -kInfinity});
    EXPECT_EQ(parts.weight, (std::vector<uint16_t>{0x7F80, 0xFF80, 0x7F7F, 0x7F80, 0xFF80}));
    EXPECT_EQ(parts.remainder, (std::vector<int16_t>{-1, -1, 0x7FFF, 0, 0}));
    EXPECT_EQ(Join(parts)[0], largest);
    EXPECT_EQ(Join(parts)[1], -largest);
  });
}

TEST(Master, SplitIsExactOnRandomBits) {
  Source source(31);
  std::vector<float> master(1 << 18);
  for (float& value : master) {
    do {
      value = FloatOf(source.Bits());
    } while (std::isnan(value));
  }
  ForEachTarget([&] { EXPECT_TRUE(SameBits(Join(Split(master)), master)); });
}

// Returns the finite fp16 values by definition, ascending from 0; the index is the bit pattern.
std::vector<double> PositiveF16Values() {
  std::vector<double> values;
  for (int bits = 0; bits < 0x7C00; ++bits) {
    const int exponent = bits >> 10;
    values.push_back(exponent == 0 ? std::ldexp(bits, -24)
                                   : std::ldexp(1024 + bits % 1024, exponent - 25));
  }
  return values;
}

// Rounds by search to the nearest value. A tie goes to the even pattern; half a step beyond the
// largest value, or more, becomes infinity.
uint16_t NearestF16(const std::vector<double>& values, float x) {
  const double magnitude = std::fabs(static_cast<double>(x));
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (magnitude >= 65520) return sign | 0x7C00;
  if (magnitude >= 65504) return sign | 0x7BFF;
  const size_t upper = std::upper_bound(values.begin(), values.end(), magnitude) - values.begin();
  const double up = values[upper] - magnitude;
  const double down = magnitude - values[upper - 1];
  const bool goes_up = up < down || (up == down && upper % 2 == 0);
  return static_cast<uint16_t>(sign | (goes_up ? upper : upper - 1));
}

TEST(Casts, F16IsNearestTiesToEven) {
  const std::vector<double> values = PositiveF16Values();
  std::vector<float> inputs;
  for (size_t i = 0; i + 1 < values.size(); ++i) {  // each value, each middle, and their neighbours
    for (const double point : {values[i], (values[i] + values[i + 1]) / 2}) {
      const float x = static_cast<float>(point);
      for (const float y : {x, std::nextafter(x, 1e9f), std::nextafter(x, -1e9f)}) {
        inputs.push_back(y);
        inputs.push_back(-y);
      }
    }
  }
  for (const float x : {65504.0f, 65519.99f, 65520.0f, 1e30f, kInfinity, 1e-30f, 1e-45f}) {
    inputs.push_back(x);
    inputs.push_back(-x);
  }
  ForEachTarget([&] {
    std::vector<uint16_t> rounded(inputs.size());
    ASSERT_TRUE(RoundToF16(inputs, absl::MakeSpan(rounded)).ok());
    for (size_t i = 0; i < inputs.size(); ++i) {
      ASSERT_EQ(rounded[i], NearestF16(values, inputs[i])) << inputs[i];
    }
  });
}

TEST(Casts, WidensEveryPattern) {
  const std::vector<double> values = PositiveF16Values();
  std::vector<uint16_t> patterns(0x10000);
  for (size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<uint16_t>(i);
  ForEachTarget([&] {
    std::vector<float> from_bf16(patterns.size()), from_f16(patterns.size());
    ASSERT_TRUE(
        WidenToF32({DType::kBF16, patterns.data(), patterns.size()}, absl::MakeSpan(from_bf16))
            .ok());
    ASSERT_TRUE(
        WidenToF32({DType::kF16, patterns.data(), patterns.size()}, absl::MakeSpan(from_f16)).ok());
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      ASSERT_EQ(BitsOf(from_bf16[bits]), bits << 16);
      const uint32_t magnitude = bits & 0x7FFF;
      const float sign = bits & 0x8000 ? -1.0f : 1.0f;
      if (magnitude > 0x7C00) {
        ASSERT_EQ(BitsOf(from_f16[bits]), 0x7FC00000u);
      } else {
        const double value = magnitude == 0x7C00 ? kInfinity : values[magnitude];
        ASSERT_EQ(BitsOf(from_f16[bits]), BitsOf(sign * static_cast<float>(value))) << bits;
      }
    }
  });
}

TEST(Casts, NaNBecomesCanonical) {
  ForEachTarget([] {
    const std::vector<float> nans(20, FloatOf(0xFFFFFFFF));
    std::vector<uint16_t> bits(20);
    ASSERT_TRUE(RoundToBF16(nans, absl::MakeSpan(bits)).ok());
    EXPECT_EQ(bits, std::vector<uint16_t>(20, 0x7FC0));
    ASSERT_TRUE(RoundToF16(nans, absl::MakeSpan(bits)).ok());
    EXPECT_EQ(bits, std::vector<uint16_t>(20, 0x7E00));
  });
}

TEST(Casts, F16ReportsMastersBeyondItsRange) {
  ForEachTarget([] {
    for (const size_t at : {0, 5, 33, 39}) {
      std::vector<float> master(40, 1.5f);
      master[at] = -65504.004f;
      master[39] = kInfinity;
      master[2] = 65504.0f;             // still fits
      master[3] = FloatOf(0x7FC00000);  // NaN is not an overflow
      const Parts parts = Split(master);
      std::vector<uint16_t> rounded(40);
      F16Overflow overflow{7, 7};
      ASSERT_TRUE(
          JoinMasterToF16(parts.weight, parts.remainder, absl::MakeSpan(rounded), &overflow).ok());
      EXPECT_EQ(overflow.count, at == 39 ? 1u : 2u);
      EXPECT_EQ(overflow.first_index, at);
      EXPECT_EQ(rounded[2], 0x7BFF);
      EXPECT_EQ(rounded[3], 0x7E00);
    }
  });
}

TEST(Casts, F16IsRoundedOnceFromTheExactMaster) {
  ForEachTarget([] {
    // 1 + 2^-11 + 2^-20 rounds up in fp16; its bf16 weight, 1.0, would give 1.0.
    const Parts parts = Split({1.0f + 0x1p-11f + 0x1p-20f});
    std::vector<uint16_t> rounded(1);
    F16Overflow overflow;
    ASSERT_TRUE(
        JoinMasterToF16(parts.weight, parts.remainder, absl::MakeSpan(rounded), &overflow).ok());
    EXPECT_EQ(rounded[0], 0x3C01);
    EXPECT_EQ(overflow.count, 0u);
  });
}

TEST(Casts, RefusesCountsThatDiffer) {
  std::vector<float> master(3, 1.0f);
  std::vector<uint16_t> weight(3, 9);
  std::vector<int16_t> remainder(2, 9);
  const absl::Status status =
      SplitMaster(master, absl::MakeSpan(weight), absl::MakeSpan(remainder));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("remainder has 2 elements, expected 3"));
  EXPECT_EQ(weight, std::vector<uint16_t>(3, 9));
}

}  // namespace
}  // namespace orlop::kernels
