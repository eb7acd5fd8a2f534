#include "kernels/reduce.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/casts.h"
#include "kernels/testing/test_data.h"
#include "kernels/types.h"

namespace orlop::kernels {
namespace {

using testing::BitsOf;
using testing::FloatOf;
using testing::ForEachTarget;
using ::testing::HasSubstr;
using testing::Hostility;
using testing::kAllTypes;
using testing::OddlyAligned;
using testing::SameBits;
using testing::Source;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TypedSpan Span(const std::vector<float>& values) {
  return {DType::kF32, values.data(), values.size()};
}

uint64_t Bits(double value) { return std::bit_cast<uint64_t>(value); }

TEST(Reduce, AgreesWithExtendedPrecision) {
  Source source(51);
  const std::vector<float> values = source.Floats(100003, Hostility::kHeavyTailed);
  long double expected = 0;
  for (const float value : values) expected += static_cast<long double>(value) * value;
  ForEachTarget([&] {
    BlockSums sums;
    ReduceGradient(Span(values), &sums);
    EXPECT_NEAR(sums.sum_squares / static_cast<double>(expected), 1, 1e-14) << "seed 51";
    EXPECT_EQ(sums.nonfinite_count, 0u);
  });
}

// At 2^54 the distance between two fp64 numbers is 4: adding 1 or 2 changes nothing (2 is a tie,
// which rounds back), and adding 4 does. The sums therefore show the order of the additions, which
// reduce.h states ("Order").
TEST(Reduce, AddsInTheStatedOrder) {
  const float large = 0x1p27f;
  const double square = 0x1p54;
  ForEachTarget([&] {
    std::vector<float> values(256, 0);
    values[0] = large;
    // Elements that are 16 apart are in one lane, which adds them one by one: each 1 is lost.
    for (size_t i = 1; i < 16; ++i) values[16 * i] = 1;
    BlockSums same_lane;
    ReduceGradient(Span(values), &same_lane);
    EXPECT_EQ(same_lane.sum_squares, square);

    std::fill(values.begin() + 1, values.end(), 0);
    // Each lane has one element. Lane l adds lane l + 8, then l + 4, l + 2 and l + 1. So lane 0
    // adds 1 (lost), 2 (lost), 4 and 8. In index order all fifteen would be lost.
    for (int i = 1; i < 16; ++i) values[i] = 1;
    BlockSums lanes;
    ReduceGradient(Span(values), &lanes);
    EXPECT_EQ(lanes.sum_squares, square + 12);
  });
}

TEST(Reduce, PiecesOfWholeBlocksGiveTheBitsOfOneCall) {
  Source source(52);
  for (const DType dtype : kAllTypes) {
    // 40 whole blocks and one of 17 elements.
    const OddlyAligned gradient(source, dtype, 40 * 256 + 17, Hostility::kTame);
    BlockSums whole;
    ReduceGradient(gradient.span(), &whole);
    ForEachTarget([&] {
      for (const size_t blocks : {1, 3, 7, 16, 41}) {
        BlockSums pieces;
        std::vector<uint8_t> copy(gradient.span().count * SizeOf(dtype));
        for (size_t at = 0; at < gradient.span().count; at += blocks * 256) {
          CopyAndReduce(copy.data() + at * SizeOf(dtype), Slice(gradient.span(), at, blocks * 256),
                        &pieces);
        }
        ASSERT_EQ(Bits(pieces.sum_squares), Bits(whole.sum_squares)) << blocks << " blocks";
        ASSERT_EQ(std::memcmp(copy.data(), gradient.span().data, copy.size()), 0);
      }
    });
  }
}

TEST(Reduce, CountsNonFiniteElementsAndLeavesThemOut) {
  Source source(53);
  // The first and last elements of lanes' rows (16), of blocks (256), and of the short last block.
  for (const size_t at : {0, 15, 16, 255, 256, 511, 520}) {
    std::vector<float> values = source.Floats(521, Hostility::kTame);
    // 0x7FC00000 is a quiet NaN, 0xFF800001 a negative signalling NaN.
    for (const float bad : {FloatOf(0x7FC00000), FloatOf(0xFF800001), kInfinity, -kInfinity}) {
      values[at] = 0;
      BlockSums without;
      ReduceGradient(Span(values), &without);
      values[at] = bad;
      ForEachTarget([&] {
        BlockSums sums, copied;
        std::vector<float> copy(values.size());
        ReduceGradient(Span(values), &sums);
        CopyAndReduce(copy.data(), Span(values), &copied);
        ASSERT_EQ(sums.nonfinite_count, 1u) << at;
        ASSERT_EQ(copied.nonfinite_count, 1u) << at;
        ASSERT_EQ(Bits(sums.sum_squares), Bits(without.sum_squares));
        ASSERT_EQ(Bits(copied.sum_squares), Bits(without.sum_squares));
        ASSERT_TRUE(SameBits(copy, values));
      });
    }
  }
}

TEST(Reduce, SquaresOfTheLargestGradientsDoNotOverflow) {
  const std::vector<float> values(512, std::numeric_limits<float>::max());
  ForEachTarget([&] {
    BlockSums sums;
    ReduceGradient(Span(values), &sums);
    EXPECT_EQ(sums.nonfinite_count, 0u);
    EXPECT_DOUBLE_EQ(sums.sum_squares, 512 * std::pow(std::numeric_limits<float>::max(), 2.0));
  });
}

TEST(Reduce, OfNothingIsNothing) {
  ForEachTarget([] {
    BlockSums sums{2.5, 3};
    ReduceGradient({DType::kBF16, nullptr, 0}, &sums);
    CopyAndReduce(nullptr, {DType::kF32, nullptr, 0}, &sums);
    EXPECT_EQ(sums.sum_squares, 2.5);
    EXPECT_EQ(sums.nonfinite_count, 3u);
  });
}

TEST(Accumulate, AddsInFp32InTheOrderOfTheCalls) {
  ForEachTarget([] {
    std::vector<float> sum(300);
    const std::vector<float> large(300, 1e8f), one(300, 1), minus(300, -1e8f);
    ASSERT_TRUE(WidenToF32(Span(large), absl::MakeSpan(sum)).ok());
    // 1e8 + 1 rounds to 1e8 in fp32.
    ASSERT_TRUE(AccumulateToF32(Span(one), absl::MakeSpan(sum)).ok());
    ASSERT_TRUE(AccumulateToF32(Span(minus), absl::MakeSpan(sum)).ok());
    EXPECT_EQ(sum, std::vector<float>(300, 0));
    const std::vector<uint16_t> half(300, 0x3F00);  // 0.5 in bf16
    ASSERT_TRUE(AccumulateToF32({DType::kBF16, half.data(), 300}, absl::MakeSpan(sum)).ok());
    EXPECT_EQ(sum, std::vector<float>(300, 0.5f));
  });
}

TEST(Accumulate, MakesNaNCanonical) {
  ForEachTarget([] {
    // inf - inf is a NaN whose bits depend on the processor.
    std::vector<float> sum(9, kInfinity);
    ASSERT_TRUE(AccumulateToF32(Span(std::vector<float>(9, -kInfinity)), absl::MakeSpan(sum)).ok());
    for (const float value : sum) EXPECT_EQ(BitsOf(value), 0x7FC00000u);
  });
}

TEST(Accumulate, RefusesCountsThatDiffer) {
  std::vector<float> sum(2), more(3);
  const absl::Status status = AccumulateToF32(Span(more), absl::MakeSpan(sum));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("accumulator has 2 elements, expected 3"));
}

}  // namespace
}  // namespace orlop::kernels
