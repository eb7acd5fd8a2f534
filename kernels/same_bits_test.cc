// Compares every kernel on every instruction set with the scalar reference, bit for bit: all counts
// from 0 to 513, spans at odd addresses, tame, heavy-tailed and arbitrary bit patterns.
#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "kernels/blocks.h"
#include "kernels/casts.h"
#include "kernels/optimizer.h"
#include "kernels/quantize.h"
#include "kernels/reduce.h"
#include "kernels/reference.h"
#include "kernels/targets.h"
#include "kernels/testing/test_data.h"
#include "kernels/testing/test_range.h"
#include "kernels/types.h"
#include "kernels/whole_tensor.h"

namespace orlop::kernels {
namespace {

using testing::AllFormats;
using testing::ForEachTarget;
using testing::Formats;
using testing::HostileRange;
using testing::Hostility;
using testing::kAllHostilities;
using testing::kAllTypes;
using testing::NameOf;
using testing::OddlyAligned;
using testing::Range;
using testing::SameBits;
using testing::ScalarsFor;
using testing::Source;
using testing::Tails;
using testing::Variants;

// Runs Step and the reference on equal ranges of every count and hostility. Returns the number of
// elements.
size_t CompareWithReference(const Optimizer* optimizer, Formats formats,
                            const std::vector<double>& values, uint64_t seed) {
  size_t elements = 0;
  ForEachTarget([&] {
    Source source(seed);
    for (const size_t count : Tails()) {
      const Hostility hostility = kAllHostilities[count % 3];
      const DType dtype = kAllTypes[count / 3 % 3];
      const OddlyAligned gradient(source, dtype, count, hostility);
      Range actual = HostileRange(source, optimizer, formats, count, hostility);
      Range expected = actual;
      const StepScalars scalars = ScalarsFor(*optimizer, values, count);
      const bool in_place = count % 2 == 0;
      const auto step = [&](Range& range) {
        return range.StepOf(scalars, gradient.span(), seed, 0, count, in_place);
      };
      const auto measured = [&](auto measure, Range& range) {
        Measured sums;
        std::vector<float> first(count);
        measure(step(range), &sums, first.data());
        std::vector<double> result(first.begin(), first.end());
        for (const BlockSums& of : sums.sums)
          result.insert(result.end(), {of.sum_squares, static_cast<double>(of.nonfinite_count)});
        return result;
      };
      const auto measure = [](const RangeStep& step, Measured* sums, float* first) {
        const absl::Status status = Measure(step, sums, first);
        EXPECT_TRUE(status.ok()) << status;
      };
      if (count > 0) {
        EXPECT_TRUE(SameBits(measured(measure, actual), measured(reference::Measure, actual)));
      }
      actual.ExpectSameBits(expected);  // nothing was changed
      const absl::Status status = Step(step(actual));
      ASSERT_TRUE(status.ok()) << status;
      if (count > 0) reference::Step(step(expected));
      actual.ExpectSameBits(expected);
      elements += count;
      if (::testing::Test::HasFailure())
        FAIL() << optimizer->name << " " << NameOf(formats) << ", count " << count << ", seed "
               << seed;
    }
  });
  return elements;
}

// Prints what the other tests compared, and checks that every machine's baseline is present: the
// scalar reference on x86, NEON on AArch64.
TEST(SameBits, TheBaselineIsAlwaysATarget) {
  std::string names;
  for (const int64_t target : SupportedTargets()) names += TargetName(target) + " ";
  std::printf("instruction sets compared: %s; %zu counts\n", names.c_str(), Tails().size());
#if defined(__aarch64__)
  EXPECT_NE(names.find("NEON"), std::string::npos) << names;
#else
  EXPECT_TRUE(names.ends_with("SCALAR ")) << names;
#endif
}

TEST(SameBits, EveryOptimizerInEveryFormat) {
  size_t elements = 0;
  uint64_t seed = 100;
  for (const OptimizerUnit& unit : OptimizerUnits()) {
    for (const std::vector<double>& values : Variants(unit.optimizer)) {
      for (const Formats& formats : AllFormats()) {
        elements += CompareWithReference(&unit.optimizer, formats, values, ++seed);
        if (HasFailure()) return;
      }
    }
  }
  std::printf("%zu elements compared, seeds 101 to %zu\n", elements, static_cast<size_t>(seed));
}

void ExpectStepsLikeTheReference(Range actual, TypedSpan gradient, bool in_place) {
  Range expected = actual;
  const StepScalars scalars = ScalarsFor(*actual.optimizer, testing::Values(*actual.optimizer), 3);
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    const auto step = [&](Range& range) {
      return range.StepOf(scalars, gradient, seed, 0, range.count, in_place);
    };
    const absl::Status status = Step(step(actual));
    ASSERT_TRUE(status.ok()) << status;
    reference::Step(step(expected));
    actual.ExpectSameBits(expected);
  }
}

// A block is encoded while the next one is stepped. This has runs of blocks that take this path,
// and others between them that do not.
TEST(SameBits, RunsOfBlocksPlainAndNot) {
  constexpr size_t kCount = 9 * kQuantBlock + 77;
  for (const OptimizerUnit& unit : OptimizerUnits()) {
    ForEachTarget([&] {
      for (int variant = 0; variant < 8; ++variant) {
        Source source(300 + variant);
        const DType dtype = variant % 2 == 0 ? DType::kBF16 : DType::kF32;
        const OddlyAligned gradient(source, dtype, kCount, Hostility::kTame);
        Range range =
            HostileRange(source, &unit.optimizer, {StateFormat::k8Bit}, kCount, Hostility::kTame);
        for (size_t s = 0; s < unit.optimizer.states.size() && variant >= 4; ++s) {
          for (const size_t block : {2, 3, 6}) range.absmax[s][block] = 1e30f;
        }
        ExpectStepsLikeTheReference(range, gradient.span(), variant / 2 % 2 == 0);
        if (HasFailure()) FAIL() << unit.optimizer.name << ", variant " << variant;
      }
    });
  }
}

// A random number near 1 rounds the last entry up to a number that has no code.
TEST(SameBits, StochasticRoundingEndsAtTheLastCode) {
  constexpr size_t kCount = 1 << 19;  // about one in 2^16 to 2^17 rounds like this
  const Optimizer* optimizer = FindOptimizer("adamw");
  Range range(optimizer, {StateFormat::k8Bit, MasterFormat::kExact, Rounding::kStochastic},
              std::vector<float>(kCount, 0.5f));
  for (size_t s = 0; s < optimizer->states.size(); ++s) {
    range.codes[s].assign(kCount, 255);
    std::fill(range.absmax[s].begin(), range.absmax[s].end(), 1.0f);
  }
  const std::vector<float> zeros(kCount);
  ForEachTarget([&] { ExpectStepsLikeTheReference(range, testing::Span(zeros), true); });
}

TEST(SameBits, CastsAndMasters) {
  ForEachTarget([] {
    Source source(21);
    for (const size_t count : Tails()) {
      const Hostility hostility = count % 2 == 0 ? Hostility::kAnyBits : Hostility::kHeavyTailed;
      const std::vector<float> values = source.Floats(count, hostility);
      std::vector<uint16_t> actual(count), expected(count), weight(count);
      std::vector<int16_t> remainder(count), expected_remainder(count);
      ASSERT_TRUE(RoundToBF16(values, absl::MakeSpan(actual)).ok());
      reference::RoundToBF16(values, absl::MakeSpan(expected));
      ASSERT_TRUE(SameBits(actual, expected));
      ASSERT_TRUE(RoundToF16(values, absl::MakeSpan(actual)).ok());
      reference::RoundToF16(values, absl::MakeSpan(expected));
      ASSERT_TRUE(SameBits(actual, expected));
      ASSERT_TRUE(SplitMaster(values, absl::MakeSpan(weight), absl::MakeSpan(remainder)).ok());
      reference::SplitMaster(values, absl::MakeSpan(expected), absl::MakeSpan(expected_remainder));
      ASSERT_TRUE(SameBits(weight, expected));
      ASSERT_TRUE(SameBits(remainder, expected_remainder));

      std::vector<float> joined(count), expected_joined(count);
      ASSERT_TRUE(JoinMaster(weight, remainder, absl::MakeSpan(joined)).ok());
      reference::JoinMaster(weight, remainder, absl::MakeSpan(expected_joined));
      ASSERT_TRUE(SameBits(joined, expected_joined));
      F16Overflow overflow, expected_overflow;
      ASSERT_TRUE(JoinMasterToF16(weight, remainder, absl::MakeSpan(actual), &overflow).ok());
      reference::JoinMasterToF16(weight, remainder, absl::MakeSpan(expected), &expected_overflow);
      ASSERT_TRUE(SameBits(actual, expected));
      ASSERT_EQ(overflow.count, expected_overflow.count);
      if (overflow.count > 0) {
        ASSERT_EQ(overflow.first_index, expected_overflow.first_index);
      }
    }
  });
}

TEST(SameBits, WidenReduceAndAccumulate) {
  ForEachTarget([] {
    Source source(22);
    for (const size_t count : Tails()) {
      for (const DType dtype : kAllTypes) {
        const Hostility hostility = kAllHostilities[count % 3];
        const OddlyAligned gradient(source, dtype, count, hostility);
        std::vector<float> actual(count), expected(count);
        ASSERT_TRUE(WidenToF32(gradient.span(), absl::MakeSpan(actual)).ok());
        reference::WidenToF32(gradient.span(), absl::MakeSpan(expected));
        ASSERT_TRUE(SameBits(actual, expected));

        actual = source.Floats(count, hostility);
        expected = actual;
        ASSERT_TRUE(AccumulateToF32(gradient.span(), absl::MakeSpan(actual)).ok());
        reference::AccumulateToF32(gradient.span(), absl::MakeSpan(expected));
        ASSERT_TRUE(SameBits(actual, expected));

        BlockSums reduced, copied, wanted;
        std::vector<uint8_t> copy(1 + count * SizeOf(dtype));
        ReduceGradient(gradient.span(), &reduced);
        CopyAndReduce(copy.data() + 1, gradient.span(), &copied);
        reference::ReduceGradient(gradient.span(), &wanted);
        for (const BlockSums& sums : {reduced, copied}) {
          ASSERT_EQ(std::bit_cast<uint64_t>(sums.sum_squares),
                    std::bit_cast<uint64_t>(wanted.sum_squares));
          ASSERT_EQ(sums.nonfinite_count, wanted.nonfinite_count);
        }
        ASSERT_EQ(std::memcmp(copy.data() + 1, gradient.span().data, copy.size() - 1), 0);
      }
    }
  });
}

TEST(SameBits, QuantizeAndDequantize) {
  ForEachTarget([] {
    Source source(23);
    for (const size_t count : Tails()) {
      for (const CodeBook book : {CodeBook::kSigned, CodeBook::kUnsigned}) {
        for (const Rounding rounding : {Rounding::kNoZero, Rounding::kNearest}) {
          const std::vector<float> values = source.Floats(count, kAllHostilities[count % 3]);
          std::vector<uint8_t> codes(count), expected_codes(count);
          std::vector<float> absmax(BlockCount(count)), expected_absmax(BlockCount(count));
          ASSERT_TRUE(
              QuantizeBlocks(book, rounding, values, absl::MakeSpan(codes), absl::MakeSpan(absmax))
                  .ok());
          reference::QuantizeBlocks(book, rounding, values, absl::MakeSpan(expected_codes),
                                    absl::MakeSpan(expected_absmax));
          ASSERT_TRUE(SameBits(absmax, expected_absmax));
          ASSERT_TRUE(SameBits(codes, expected_codes));
          std::vector<float> back(count), expected_back(count);
          ASSERT_TRUE(DequantizeBlocks(book, codes, absmax, absl::MakeSpan(back)).ok());
          reference::DequantizeBlocks(book, codes, absmax, absl::MakeSpan(expected_back));
          ASSERT_TRUE(SameBits(back, expected_back));
        }
      }
    }
  });
}

}  // namespace
}  // namespace orlop::kernels
