#include "kernels/int8_blocks.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

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
using testing::Hostility;
using testing::SameBits;
using testing::Source;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<uint8_t> Encode(const std::vector<float>& values) {
  std::vector<uint8_t> wire(Int8Bytes(values.size()));
  EXPECT_TRUE(
      EncodeInt8({DType::kF32, values.data(), values.size()}, nullptr, absl::MakeSpan(wire)).ok());
  return wire;
}

std::vector<uint16_t> Decode(const std::vector<uint8_t>& wire) {
  std::vector<uint16_t> values(Int8Count(wire.size()));
  EXPECT_TRUE(DecodeInt8(wire, absl::MakeSpan(values)).ok());
  return values;
}

float ScaleOfBlock(const std::vector<uint8_t>& wire, size_t block = 0) {
  float scale;
  std::memcpy(&scale, &wire[block * kInt8BlockBytes], sizeof scale);
  return scale;
}
int CodeOf(const std::vector<uint8_t>& wire, size_t i) {
  return static_cast<int8_t>(wire[i / kQuantBlock * kInt8BlockBytes + 4 + i % kQuantBlock]);
}

TEST(Int8Blocks, SizesAreEachOthersInverse) {
  EXPECT_EQ(Int8Bytes(0), 0);
  EXPECT_EQ(Int8Bytes(1), 5);
  EXPECT_EQ(Int8Bytes(256), 260);
  EXPECT_EQ(Int8Bytes(257), 265);
  for (size_t count = 0; count < 2000; ++count) ASSERT_EQ(Int8Count(Int8Bytes(count)), count);
}

// Every instruction set, source type, tail and kind of number has the reference's bits.
TEST(Int8Blocks, SameBitsAsTheReference) {
  ForEachTarget([] {
    Source source(1);
    for (const Hostility hostility :
         {Hostility::kTame, Hostility::kHeavyTailed, Hostility::kAnyBits}) {
      for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
        for (const size_t count : {1, 7, 16, 255, 256, 257, 511, 512, 3000}) {
          const std::vector<float> values = source.Floats(count, hostility);
          std::vector<uint8_t> bytes(count * SizeOf(dtype) + 1);  // read at an odd address
          for (size_t i = 0; i < count; ++i) {
            const uint32_t bits = dtype == DType::kF32    ? BitsOf(values[i])
                                  : dtype == DType::kBF16 ? reference::F32ToBF16(values[i])
                                                          : reference::F32ToF16(values[i]);
            std::memcpy(&bytes[1 + i * SizeOf(dtype)], &bits, SizeOf(dtype));
          }
          const TypedSpan span{dtype, bytes.data() + 1, count};
          std::vector<uint16_t> residual(count), next(count), expected_next(count);
          for (uint16_t& kept : residual)
            kept = reference::F32ToBF16(0.1f * source.Float(hostility));
          for (const float loss_scale : {1.0f, 1024.0f, 3.0f}) {
            std::vector<uint8_t> wire(Int8Bytes(count)), expected(Int8Bytes(count));
            const ErrorFeedback feedback{loss_scale, residual, absl::MakeSpan(next)};
            ASSERT_TRUE(EncodeInt8(span, &feedback, absl::MakeSpan(wire)).ok());
            const ErrorFeedback expectation{loss_scale, residual, absl::MakeSpan(expected_next)};
            reference::EncodeInt8(span, &expectation, absl::MakeSpan(expected));
            ASSERT_TRUE(SameBits(wire, expected)) << count;
            ASSERT_TRUE(SameBits(next, expected_next)) << count;
            std::vector<uint16_t> decoded(count);
            reference::DecodeInt8(wire, absl::MakeSpan(decoded));
            ASSERT_TRUE(SameBits(Decode(wire), decoded)) << count;
          }
          std::vector<uint8_t> wire(Int8Bytes(count)), expected(Int8Bytes(count));
          ASSERT_TRUE(EncodeInt8(span, nullptr, absl::MakeSpan(wire)).ok());
          reference::EncodeInt8(span, nullptr, absl::MakeSpan(expected));
          ASSERT_TRUE(SameBits(wire, expected)) << count;
        }
      }
    }
  });
}

// A sender may write any code, also -128, and scales of every magnitude.
TEST(Int8Blocks, DecodesWhatOthersSendAsTheReferenceDoes) {
  ForEachTarget([] {
    Source source(2);
    for (const float scale :
         {0.0f, FloatOf(1), FloatOf(0x007FFFFF), 1e-30f, 0.7f, 3.4e38f, kInfinity, kNaN}) {
      std::vector<uint8_t> wire = source.Integers<uint8_t>(kInt8BlockBytes);
      std::memcpy(wire.data(), &scale, sizeof scale);
      wire[4] = 0x80;
      std::vector<uint16_t> expected(kQuantBlock);
      reference::DecodeInt8(wire, absl::MakeSpan(expected));
      ASSERT_TRUE(SameBits(Decode(wire), expected)) << scale;
      if (!std::isfinite(scale)) {
        EXPECT_EQ(expected, std::vector<uint16_t>(kQuantBlock, 0x7FC0));
      } else {
        EXPECT_EQ(expected[0], reference::F32ToBF16(-128 * scale));
      }
    }
  });
}

TEST(Int8Blocks, CodesAreNearestAndTiesEven) {
  ForEachTarget([] {
    std::vector<float> values(300, 0.0f);
    values[0] = 127;  // scale 1
    values[1] = 0.5f;
    values[2] = 1.5f;
    values[3] = -2.5f;
    values[4] = 2.5000002f;
    values[5] = -0.0f;
    const std::vector<uint8_t> wire = Encode(values);
    EXPECT_EQ(ScaleOfBlock(wire), 1);
    const int expected[] = {127, 0, 2, -2, 3, 0};
    for (size_t i = 0; i < 6; ++i) EXPECT_EQ(CodeOf(wire, i), expected[i]) << i;
    EXPECT_EQ(ScaleOfBlock(wire, 1), 0);  // all elements are zero
    EXPECT_EQ(Decode(wire)[299], 0);
  });
}

// The error is at most half a quantum plus half an ulp of bf16.
TEST(Int8Blocks, ErrorIsHalfAQuantum) {
  ForEachTarget([] {
    Source source(3);
    for (const Hostility hostility : {Hostility::kTame, Hostility::kHeavyTailed}) {
      const std::vector<float> values = source.Floats(5000, hostility);
      const std::vector<uint8_t> wire = Encode(values);
      const std::vector<uint16_t> decoded = Decode(wire);
      for (size_t i = 0; i < values.size(); ++i) {
        const double scale = ScaleOfBlock(wire, i / kQuantBlock);
        const double error = std::fabs(double{reference::BF16ToF32(decoded[i])} - values[i]);
        ASSERT_LE(error, scale * 0.50001 + std::fabs(values[i]) * 0x1p-8) << i;
      }
    }
  });
}

TEST(Int8Blocks, OneBadElementMakesItsBlockNaN) {
  ForEachTarget([] {
    for (const float bad : {kNaN, -kNaN, kInfinity, -kInfinity}) {
      std::vector<float> values(3 * kQuantBlock, 1.0f);
      values[kQuantBlock + 77] = bad;
      const std::vector<uint8_t> wire = Encode(values);
      EXPECT_EQ(BitsOf(ScaleOfBlock(wire, 1)), 0x7FC00000u);
      const std::vector<uint16_t> decoded = Decode(wire);
      for (size_t i = 0; i < decoded.size(); ++i)
        ASSERT_EQ(decoded[i] == 0x7FC0, i / kQuantBlock == 1) << i;
    }
  });
}

TEST(Int8Blocks, TinyValuesAreClampedOrZero) {
  ForEachTarget([] {
    const float least = std::numeric_limits<float>::denorm_min();
    std::vector<float> values(8, 0.0f);
    values[0] = 60 * least;  // its scale is 0
    EXPECT_EQ(ScaleOfBlock(Encode(values)), 0);
    EXPECT_EQ(CodeOf(Encode(values), 0), 0);
    values[1] = -190 * least;  // its scale is 1 least, though the quotient is -190
    EXPECT_EQ(ScaleOfBlock(Encode(values)), least);
    EXPECT_EQ(CodeOf(Encode(values), 0), 60);
    EXPECT_EQ(CodeOf(Encode(values), 1), -127);
  });
}

// The sum of all values sent equals the sum of all values given, within one quantum, for any loss
// scales.
TEST(Int8Blocks, FeedbackSendsEverythingInTheEnd) {
  ForEachTarget([] {
    Source source(4);
    const size_t count = 700;
    std::vector<float> constant = source.Floats(count, Hostility::kTame);
    std::vector<uint16_t> residual(count, 0), next(count);
    std::vector<double> given(count), sent(count);
    std::vector<double> quantum(count);
    for (int step = 0; step < 400; ++step) {
      const float loss_scale = step % 3 == 0 ? 1.0f : step % 3 == 1 ? 65536.0f : 0.125f;
      std::vector<float> gradient(count);
      for (size_t i = 0; i < count; ++i)
        gradient[i] = (constant[i] * 0.01f + source.Float(Hostility::kTame)) * loss_scale;
      std::vector<uint8_t> wire(Int8Bytes(count));
      const ErrorFeedback feedback{loss_scale, residual, absl::MakeSpan(next)};
      ASSERT_TRUE(
          EncodeInt8({DType::kF32, gradient.data(), count}, &feedback, absl::MakeSpan(wire)).ok());
      const std::vector<uint16_t> decoded = Decode(wire);
      for (size_t i = 0; i < count; ++i) {
        given[i] += double{gradient[i]} / loss_scale;
        sent[i] += double{reference::BF16ToF32(decoded[i])} / loss_scale;
        quantum[i] = std::max<double>(quantum[i], ScaleOfBlock(wire, i / kQuantBlock) / loss_scale);
      }
      std::swap(residual, next);
    }
    for (size_t i = 0; i < count; ++i) ASSERT_NEAR(sent[i], given[i], quantum[i]) << i;
  });
}

TEST(Int8Blocks, RefusesOtherSizesAndNegativeScales) {
  std::vector<float> values(300, 1.0f);
  std::vector<uint8_t> wire(Int8Bytes(300));
  std::vector<uint16_t> decoded(300), short_residual(299);
  const TypedSpan span{DType::kF32, values.data(), values.size()};
  EXPECT_THAT(std::string(EncodeInt8(span, nullptr, absl::MakeSpan(wire).first(300)).message()),
              HasSubstr("wire has 300 elements, expected 308"));
  const ErrorFeedback feedback{1, short_residual, absl::MakeSpan(decoded)};
  EXPECT_THAT(std::string(EncodeInt8(span, &feedback, absl::MakeSpan(wire)).message()),
              HasSubstr("residual has 299 elements, expected 300"));
  ASSERT_TRUE(EncodeInt8(span, nullptr, absl::MakeSpan(wire)).ok());
  EXPECT_THAT(
      std::string(
          DecodeInt8(absl::MakeConstSpan(wire).first(307), absl::MakeSpan(decoded)).message()),
      HasSubstr("wire has 307 elements, expected 308"));
  for (const float negative : {-0.0f, -1.0f, -kInfinity}) {
    std::memcpy(&wire[kInt8BlockBytes], &negative, sizeof negative);
    EXPECT_THAT(std::string(DecodeInt8(wire, absl::MakeSpan(decoded)).message()),
                HasSubstr("scale of block 1 is -"));
  }
  std::memcpy(&wire[kInt8BlockBytes], &kNaN, sizeof kNaN);
  wire[kInt8BlockBytes + 3] |= 0x80;  // a negative NaN is valid as well
  EXPECT_TRUE(DecodeInt8(wire, absl::MakeSpan(decoded)).ok());
}

}  // namespace
}  // namespace orlop::kernels
