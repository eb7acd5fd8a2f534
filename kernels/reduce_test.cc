#include "kernels/reduce.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/casts.h"
#include "kernels/testing/test_data.h"

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

// From 2^54 on, fp64 has only multiples of 4: adding 1 changes nothing, adding 4 does. So the sums
// show which elements were added first.
TEST(Reduce, AddsInTheStatedOrder) {
  const float large = 0x1p27f;
  const double square = 0x1p54;  // numbers up from here are 4 apart
  ForEachTarget([&] {
    std::vector<float> values(256, 0);
    values[0] = large;
    for (int i = 1; i < 16; ++i) values[16 * i] = 1;  // the same lane: added one by one, in order
    BlockSums same_lane;
    ReduceGradient(Span(values), &same_lane);
    EXPECT_EQ(same_lane.sum_squares, square);  // each 1 is lost

    std::fill(values.begin() + 1, values.end(), 0);
    for (int i = 1; i < 16; ++i) values[i] = 1;  // other lanes: by halves, 8 then 4, 2, 1
    BlockSums lanes;
    ReduceGradient(Span(values), &lanes);
    // Lane 0 adds 1 (lost), 2 (a tie, lost), 4 and 8; in index order all fifteen would be lost.
    EXPECT_EQ(lanes.sum_squares, square + 12);
  });
}

TEST(Reduce, PiecesOfWholeBlocksGiveTheBitsOfOneCall) {
  Source source(52);
  for (const DType dtype : kAllTypes) {
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
  for (const size_t at : {0, 15, 16, 255, 256, 511, 520}) {
    std::vector<float> values = source.Floats(521, Hostility::kTame);
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
    ASSERT_TRUE(AccumulateToF32(Span(one), absl::MakeSpan(sum)).ok());  // lost: 1e8 + 1
    ASSERT_TRUE(AccumulateToF32(Span(minus), absl::MakeSpan(sum)).ok());
    EXPECT_EQ(sum, std::vector<float>(300, 0));
    const std::vector<uint16_t> half(300, 0x3F00);  // 0.5 in bf16
    ASSERT_TRUE(AccumulateToF32({DType::kBF16, half.data(), 300}, absl::MakeSpan(sum)).ok());
    EXPECT_EQ(sum, std::vector<float>(300, 0.5f));
  });
}

TEST(Accumulate, MakesNaNCanonical) {
  ForEachTarget([] {
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
