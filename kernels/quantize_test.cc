#include "kernels/quantize.h"

#include <algorithm>
#include <array>
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
#include "kernels/testing/test_data.h"
#include "kernels/types.h"

namespace orlop::kernels {
namespace {

using testing::BitsOf;
using testing::FloatOf;
using testing::ForEachTarget;
using ::testing::HasSubstr;
using testing::Source;

const std::array<float, 256>& TableOf(CodeBook book) {
  return book == CodeBook::kSigned ? kSignedCodeBook : kUnsignedCodeBook;
}

struct Quantized {
  std::vector<uint8_t> codes;
  std::vector<float> absmax;
};

Quantized Quantize(CodeBook book, Rounding rounding, const std::vector<float>& values) {
  Quantized result{std::vector<uint8_t>(values.size()),
                   std::vector<float>(BlockCount(values.size()))};
  EXPECT_TRUE(QuantizeBlocks(book, rounding, values, absl::MakeSpan(result.codes),
                             absl::MakeSpan(result.absmax))
                  .ok());
  return result;
}

std::vector<float> Dequantize(CodeBook book, const Quantized& quantized) {
  std::vector<float> values(quantized.codes.size());
  EXPECT_TRUE(
      DequantizeBlocks(book, quantized.codes, quantized.absmax, absl::MakeSpan(values)).ok());
  return values;
}

// Returns the nearest of all 256 entries by trying each in extended precision. A tie gets the even
// code.
uint8_t BruteForceCode(CodeBook book, float r) {
  int best = 0;
  long double best_distance = std::numeric_limits<long double>::infinity();
  for (int code = 0; code < 256; ++code) {
    const long double distance =
        std::fabs(static_cast<long double>(r) - static_cast<long double>(TableOf(book)[code]));
    if (distance < best_distance || (distance == best_distance && code % 2 == 0)) {
      best = code;
      best_distance = distance;
    }
  }
  return static_cast<uint8_t>(best);
}

TEST(CodeBook, EqualsTheClosedForm) {
  std::vector<float> is_signed = {0, 1}, is_unsigned = {0, 1};
  for (int i = 0; i < 7; ++i) {
    for (int j = 0; j < (1 << i); ++j) {
      const double value = (0.1 + 0.9 * (j + 0.5) / (1 << i)) * std::pow(10.0, i - 6);
      is_signed.push_back(static_cast<float>(value));
      is_signed.push_back(static_cast<float>(-value));
    }
    for (int j = 0; j < (2 << i); ++j) {
      const double value = (0.1 + 0.9 * (j + 0.5) / (2 << i)) * std::pow(10.0, i - 6);
      is_unsigned.push_back(static_cast<float>(value));
    }
  }
  std::sort(is_signed.begin(), is_signed.end());
  std::sort(is_unsigned.begin(), is_unsigned.end());
  EXPECT_TRUE(std::equal(is_signed.begin(), is_signed.end(), kSignedCodeBook.begin(),
                         kSignedCodeBook.end()));
  EXPECT_TRUE(std::equal(is_unsigned.begin(), is_unsigned.end(), kUnsignedCodeBook.begin(),
                         kUnsignedCodeBook.end()));
}

// Compares with entries of the table that bitsandbytes builds, up to the two units in the last
// place by which its linspace moves them.
TEST(CodeBook, HasTheKnownEntries) {
  EXPECT_FLOAT_EQ(kSignedCodeBook[0], -0.99296874f);
  EXPECT_FLOAT_EQ(kSignedCodeBook[126], -5.5e-7f);
  EXPECT_EQ(kSignedCodeBook[127], 0.0f);
  EXPECT_FLOAT_EQ(kSignedCodeBook[128], 5.5e-7f);
  EXPECT_FLOAT_EQ(kSignedCodeBook[254], 0.99296874f);
  EXPECT_EQ(kSignedCodeBook[255], 1.0f);
  EXPECT_EQ(kUnsignedCodeBook[0], 0.0f);
  EXPECT_FLOAT_EQ(kUnsignedCodeBook[1], 3.25e-7f);
  EXPECT_FLOAT_EQ(kUnsignedCodeBook[2], 7.75e-7f);
  EXPECT_FLOAT_EQ(kUnsignedCodeBook[3], 2.125e-6f);
  EXPECT_FLOAT_EQ(kUnsignedCodeBook[253], 0.98945320f);
  EXPECT_FLOAT_EQ(kUnsignedCodeBook[254], 0.99648440f);
  EXPECT_EQ(kUnsignedCodeBook[255], 1.0f);
}

TEST(Dequantize, GivesTheTableTimesAbsmax) {
  ForEachTarget([] {
    for (const CodeBook book : {CodeBook::kSigned, CodeBook::kUnsigned}) {
      for (const float absmax : {1.0f, 0.3f, 1e-40f, 3e38f, 0.0f}) {
        Quantized quantized{std::vector<uint8_t>(256), {absmax}};
        for (int code = 0; code < 256; ++code) quantized.codes[code] = static_cast<uint8_t>(code);
        const std::vector<float> values = Dequantize(book, quantized);
        for (int code = 0; code < 256; ++code) {
          ASSERT_EQ(BitsOf(values[code]), BitsOf(TableOf(book)[code] * absmax)) << code;
        }
      }
    }
  });
}

// Points within 40 fp32 steps of every middle of two entries, and of every entry.
std::vector<float> NearTies(CodeBook book) {
  std::vector<float> points;
  for (int code = 0; code < 255; ++code) {
    const float low = TableOf(book)[code], high = TableOf(book)[code + 1];
    for (const float point : {low, static_cast<float>((static_cast<double>(low) + high) / 2)}) {
      for (int step = -40; step <= 40; ++step) {
        const float x = FloatOf(BitsOf(point) + step);
        if (std::fabs(x) <= 1) points.push_back(x);
      }
    }
  }
  return points;
}

// Returns ratios r near ties and at all magnitudes down to far below the first code, as blocks
// whose absmax is 1.
std::vector<float> Ratios(CodeBook book, Source& source) {
  std::vector<float> points = NearTies(book);
  for (int i = 0; i < 20000; ++i) {
    const double magnitude = std::pow(10.0, -10.0 * (source.Bits() % 100000) / 100000);
    points.push_back(static_cast<float>(source.Bits() % 2 == 0 ? magnitude : -magnitude));
  }
  std::vector<float> values;
  for (const float point : points) {
    if (values.size() % kQuantBlock == 0) values.push_back(1);
    values.push_back(book == CodeBook::kUnsigned ? std::fabs(point) : point);
  }
  return values;
}

TEST(Quantize, NearestIsExactEvenBesideTies) {
  Source source(41);
  for (const CodeBook book : {CodeBook::kSigned, CodeBook::kUnsigned}) {
    const std::vector<float> values = Ratios(book, source);
    std::vector<uint8_t> expected;
    for (const float value : values) {
      expected.push_back(BruteForceCode(book, value));
      if (book == CodeBook::kSigned && expected.back() == kSignedZeroCode && std::signbit(value)) {
        expected.back() = kSignedZeroCode - 1;  // a negative value keeps its sign
      }
    }
    ForEachTarget([&] {
      const Quantized quantized = Quantize(book, Rounding::kNearest, values);
      for (size_t i = 0; i < values.size(); ++i) {
        ASSERT_EQ(+quantized.codes[i], +expected[i]) << "r = " << values[i] << ", seed 41";
      }
    });
  }
}

TEST(Quantize, NoZeroIsNearestButBesideTies) {
  Source source(46);
  for (const CodeBook book : {CodeBook::kSigned, CodeBook::kUnsigned}) {
    const std::vector<float> values = Ratios(book, source);
    size_t others = 0;
    ForEachTarget([&] {
      const Quantized quantized = Quantize(book, Rounding::kNoZero, values);
      for (size_t i = 0; i < values.size(); ++i) {
        const uint8_t code = quantized.codes[i];
        uint8_t nearest = BruteForceCode(book, values[i]);
        if (book == CodeBook::kUnsigned && values[i] > 0 && nearest == 0) nearest = 1;
        if (code == nearest) continue;
        ++others;
        const double gap =
            TableOf(book)[std::max(code, nearest)] - TableOf(book)[std::min(code, nearest)];
        const double r = values[i],
                     from_middle = std::fabs(
                         r -
                         (static_cast<double>(TableOf(book)[code]) + TableOf(book)[nearest]) / 2);
        ASSERT_EQ(std::abs(code - nearest), 1) << "r = " << r << ", seed 46";
        ASSERT_LT(from_middle, 0x1p-14 * gap) << "r = " << r << ", seed 46";
      }
    });
    EXPECT_GT(others, 0u);  // ties are measured in fp32
  }
}

TEST(Quantize, ExactTiesGoToTheEvenCode) {
  int ties = 0;
  for (const CodeBook book : {CodeBook::kSigned, CodeBook::kUnsigned}) {
    for (int code = 0; code < 255; ++code) {
      const double low = TableOf(book)[code], high = TableOf(book)[code + 1];
      const double middle = (low + high) / 2;
      const float tie = static_cast<float>(middle);
      if (tie != middle) continue;  // no fp32 is exactly in the middle
      ++ties;
      ForEachTarget([&] {
        const Quantized quantized = Quantize(book, Rounding::kNearest, {1.0f, tie});
        ASSERT_EQ(quantized.codes[1] % 2, 0) << "between codes " << code << " and " << code + 1;
        ASSERT_TRUE(quantized.codes[1] == code || quantized.codes[1] == code + 1);
      });
    }
  }
  EXPECT_GT(ties, 50);
}

TEST(Quantize, NoZeroNeverCodesAPositiveValueAsZero) {
  const std::vector<float> values = {1.0f, 0.0f, 1e-9f, 1.6e-7f, 1e-45f, -1.0f, 0.5f};
  ForEachTarget([&] {
    const Quantized kept = Quantize(CodeBook::kUnsigned, Rounding::kNoZero, values);
    const Quantized nearest = Quantize(CodeBook::kUnsigned, Rounding::kNearest, values);
    EXPECT_EQ(kept.codes, (std::vector<uint8_t>{255, 0, 1, 1, 1, 0, nearest.codes[6]}));
    EXPECT_EQ(nearest.codes[2], 0);
    EXPECT_EQ(nearest.codes[3], 0);
    // A ratio that underflows to 0 does not hide that the value is positive.
    EXPECT_EQ(Quantize(CodeBook::kUnsigned, Rounding::kNoZero, {3e38f, 1e-45f}).codes[1], 1);
  });
}

TEST(Quantize, NearestKeepsTheSignAsBitsandbytesDoes) {
  ForEachTarget([] {
    const std::vector<float> values = {1.0f, -1e-9f, 1e-9f, 0.0f, -0.0f, -2.7e-7f, -2.8e-7f};
    EXPECT_EQ(Quantize(CodeBook::kSigned, Rounding::kNearest, values).codes,
              (std::vector<uint8_t>{255, 126, 127, 127, 126, 126, 126}));
    EXPECT_EQ(Quantize(CodeBook::kSigned, Rounding::kNoZero, values).codes,
              (std::vector<uint8_t>{255, 127, 127, 127, 127, 127, 126}));
  });
}

TEST(Quantize, HandlesBlocksOfZerosSubnormalsAndNearOverflow) {
  ForEachTarget([] {
    const Quantized zeros = Quantize(CodeBook::kSigned, Rounding::kNearest, {0.0f, -0.0f});
    EXPECT_EQ(zeros.codes, (std::vector<uint8_t>{127, 127}));
    EXPECT_EQ(BitsOf(zeros.absmax[0]), 0u);
    const float tiny = FloatOf(8);  // eight times the smallest subnormal
    const Quantized subnormal = Quantize(CodeBook::kSigned, Rounding::kNearest, {tiny, -tiny / 2});
    EXPECT_EQ(subnormal.absmax[0], tiny);
    EXPECT_EQ(Dequantize(CodeBook::kSigned, subnormal), (std::vector<float>{tiny, -tiny / 2}));
    const float largest = std::numeric_limits<float>::max();
    const Quantized huge = Quantize(CodeBook::kSigned, Rounding::kNearest, {largest, -largest});
    EXPECT_EQ(huge.codes, (std::vector<uint8_t>{255, 0}));  // -1 is not in the book
    EXPECT_EQ(Dequantize(CodeBook::kSigned, huge)[0], largest);
  });
}

TEST(Quantize, OneOutlierLeavesTheOthersInLowerDecades) {
  std::vector<float> values(256, 1e-5f);
  values[100] = 1;
  ForEachTarget([&] {
    const std::vector<float> back =
        Dequantize(CodeBook::kUnsigned, Quantize(CodeBook::kUnsigned, Rounding::kNoZero, values));
    EXPECT_EQ(back[100], 1.0f);
    for (size_t i = 0; i < 100; ++i) EXPECT_NEAR(back[i], 1e-5f, 0.25e-5f);
  });
}

TEST(Quantize, ABadElementLeavesItsNeighboursAlone) {
  const float nan = FloatOf(0xFFC00001);
  ForEachTarget([&] {
    const Quantized with_nan = Quantize(CodeBook::kSigned, Rounding::kNearest, {nan, -0.5f, 1.0f});
    EXPECT_EQ(with_nan.absmax[0], 1.0f);
    EXPECT_EQ(with_nan.codes[0], 127);
    EXPECT_EQ(with_nan.codes[2], 255);
    const Quantized with_infinity = Quantize(CodeBook::kUnsigned, Rounding::kNoZero,
                                             {std::numeric_limits<float>::infinity(), 1.0f});
    EXPECT_EQ(with_infinity.absmax[0], std::numeric_limits<float>::max());
    EXPECT_EQ(with_infinity.codes, (std::vector<uint8_t>{255, 1}));
  });
}

// The accuracy that bitsandbytes' own tests require of blockwise quantisation.
TEST(Quantize, IsAsAccurateAsTheFormatAllows) {
  Source source(42);
  std::vector<float> normal(1 << 18), uniform(1 << 18);
  for (float& value : normal) value = static_cast<float>(source.Normal());
  for (float& value : uniform) value = static_cast<float>(source.Bits() % 100000) / 100000;
  const auto mean_error = [](CodeBook book, const std::vector<float>& values) {
    const std::vector<float> back = Dequantize(book, Quantize(book, Rounding::kNearest, values));
    double sum = 0;
    for (size_t i = 0; i < values.size(); ++i) sum += std::fabs(back[i] - values[i]);
    return sum / static_cast<double>(values.size());
  };
  EXPECT_LT(mean_error(CodeBook::kSigned, normal), 0.011);
  EXPECT_LT(mean_error(CodeBook::kSigned, uniform), 0.0036);
  EXPECT_LT(mean_error(CodeBook::kUnsigned, uniform), 0.0023);
}

Quantized Requantize(CodeBook book, const std::vector<float>& values) {
  Quantized result{std::vector<uint8_t>(values.size()),
                   std::vector<float>(BlockCount(values.size()))};
  EXPECT_TRUE(RequantizeBlocks(book, Rounding::kNoZero, values, absl::MakeSpan(result.codes),
                               absl::MakeSpan(result.absmax))
                  .ok());
  return result;
}

TEST(Requantize, GivesBackTheCodesAndScalesThatValuesWereDecodedFrom) {
  Source source(43);
  for (const CodeBook book : {CodeBook::kSigned, CodeBook::kUnsigned}) {
    std::vector<float> values(300 * kQuantBlock + 77);
    for (float& value : values) value = static_cast<float>(std::exp(3 * source.Normal()));
    for (float& value : values) {
      if (book == CodeBook::kSigned && source.Bits() % 2 == 0) value = -value;
    }
    ForEachTarget([&] {
      const Quantized first = Quantize(book, Rounding::kNoZero, values);
      const Quantized again = Requantize(book, Dequantize(book, first));
      EXPECT_EQ(first.codes, again.codes) << "seed 43";
      EXPECT_EQ(first.absmax, again.absmax) << "seed 43";
    });
  }
}

// If several scales decode alike, any of them is correct; if none does, the values are quantised.
TEST(Requantize, KeepsEveryDecodedBitOfSparseTinyAndHugeBlocks) {
  Source source(44);
  for (const float scale : {1.0f, 1e-38f, 1e-42f, 3e38f}) {
    for (int round = 0; round < 2000; ++round) {
      std::vector<float> values(1 + source.Bits() % 4);
      for (float& value : values) value = scale * static_cast<float>(source.Bits() % 2001) / 1000;
      for (float& value : values) value = std::isfinite(value) ? value - scale : scale;
      const std::vector<float> decoded =
          Dequantize(CodeBook::kSigned, Quantize(CodeBook::kSigned, Rounding::kNoZero, values));
      const std::vector<float> again =
          Dequantize(CodeBook::kSigned, Requantize(CodeBook::kSigned, decoded));
      ASSERT_TRUE(testing::SameBits(again, decoded)) << "seed 44, scale " << scale;
    }
  }
}

TEST(Requantize, IsAQuantisationOfOtherValues) {
  Source source(45);
  for (const testing::Hostility hostility : testing::kAllHostilities) {
    const std::vector<float> values = source.Floats(20 * kQuantBlock, hostility);
    const Quantized expected = Quantize(CodeBook::kSigned, Rounding::kNoZero, values);
    const Quantized actual = Requantize(CodeBook::kSigned, values);
    EXPECT_EQ(actual.codes, expected.codes) << "seed 45";
    EXPECT_EQ(actual.absmax, expected.absmax) << "seed 45";
  }
}

TEST(Quantize, RefusesAnAbsmaxOfTheWrongLength) {
  std::vector<float> values(257), absmax(1);
  std::vector<uint8_t> codes(257, 9);
  const absl::Status status = QuantizeBlocks(CodeBook::kSigned, Rounding::kNearest, values,
                                             absl::MakeSpan(codes), absl::MakeSpan(absmax));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("absmax has 1 elements, expected 2"));
  EXPECT_EQ(codes, std::vector<uint8_t>(257, 9));
}

}  // namespace
}  // namespace orlop::kernels
