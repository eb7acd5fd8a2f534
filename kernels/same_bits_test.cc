// Every kernel on every instruction set against the scalar reference, bit for bit: all counts from
// 0 to 513, spans at odd addresses, tame, heavy-tailed and arbitrary bit patterns.
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/reference.h"
#include "kernels/test_data.h"

namespace orlop::kernels {
namespace {

using testing::ForEachTarget;
using testing::Hostility;
using testing::kAllHostilities;
using testing::kAllTypes;
using testing::OddlyAligned;
using testing::SameBits;
using testing::Source;
using testing::Tails;

// A shard range: two equal copies of everything, one per implementation.
struct Shard {
  Shard(Source& source, size_t count, Hostility hostility)
      : weight(source.Integers<uint16_t>(count)),
        remainder(source.Integers<int16_t>(count)),
        new_weight(count),
        moment1(source.Floats(count, hostility)),
        moment2(source.Absmax(count, hostility)),
        codes1(source.Integers<uint8_t>(count)),
        codes2(source.Integers<uint8_t>(count)),
        absmax1(source.Absmax(BlockCount(count), hostility)),
        absmax2(source.Absmax(BlockCount(count), hostility)) {
    if (hostility == Hostility::kAnyBits) return;
    const std::vector<float> master = source.Floats(count, hostility);
    reference::SplitMaster(master, absl::MakeSpan(weight), absl::MakeSpan(remainder));
  }
  MasterSpans master() { return {weight, absl::MakeSpan(remainder), absl::MakeSpan(new_weight)}; }
  AdamWFp32State adamw() { return {absl::MakeSpan(moment1), absl::MakeSpan(moment2)}; }
  AdamW8BitState adamw_8bit(Rounding rounding) {
    return {absl::MakeSpan(codes1), absl::MakeSpan(absmax1), absl::MakeSpan(codes2),
            absl::MakeSpan(absmax2), rounding};
  }
  SgdFp32State sgd() { return {absl::MakeSpan(moment1)}; }
  Sgd8BitState sgd_8bit() { return {absl::MakeSpan(codes1), absl::MakeSpan(absmax1)}; }

  void ExpectSameBits(const Shard& expected) const {
    EXPECT_TRUE(SameBits(weight, expected.weight));
    EXPECT_TRUE(SameBits(remainder, expected.remainder));
    EXPECT_TRUE(SameBits(new_weight, expected.new_weight));
    EXPECT_TRUE(SameBits(moment1, expected.moment1));
    EXPECT_TRUE(SameBits(moment2, expected.moment2));
    EXPECT_TRUE(SameBits(codes1, expected.codes1));
    EXPECT_TRUE(SameBits(codes2, expected.codes2));
    EXPECT_TRUE(SameBits(absmax1, expected.absmax1));
    EXPECT_TRUE(SameBits(absmax2, expected.absmax2));
  }

  std::vector<uint16_t> weight;
  std::vector<int16_t> remainder;
  std::vector<uint16_t> new_weight;
  std::vector<float> moment1, moment2;
  std::vector<uint8_t> codes1, codes2;
  std::vector<float> absmax1, absmax2;
};

// Runs `kernel` and `reference` on equal shards of every count, type and hostility.
template <class Kernel, class Reference>
void CompareOptimizers(uint64_t seed, Kernel kernel, Reference reference) {
  ForEachTarget([&] {
    Source source(seed);
    for (const size_t count : Tails()) {
      for (const Hostility hostility : kAllHostilities) {
        const DType dtype = kAllTypes[count % 3];
        const OddlyAligned gradient(source, dtype, count, hostility);
        Shard actual(source, count, hostility);
        Shard expected = actual;
        ASSERT_TRUE(kernel(gradient.span(), actual).ok());
        reference(gradient.span(), expected);
        actual.ExpectSameBits(expected);
        if (::testing::Test::HasFailure()) FAIL() << "count " << count << ", seed " << seed;
      }
    }
  });
}

// Tells what the other tests compared, and that the fall-back is always there.
TEST(SameBits, TheScalarReferenceIsAlwaysATarget) {
  std::string names;
  for (const int64_t target : SupportedTargets()) names += TargetName(target) + " ";
  std::printf("instruction sets compared: %s\n", names.c_str());
  EXPECT_TRUE(names.ends_with("SCALAR ")) << names;
}

TEST(SameBits, AdamWFp32) {
  for (const double beta2 : {0.999, 0.3, 0.0}) {  // both forms of Lerp
    const AdamWScalars scalars = PrepareAdamW({1e-3, 0.9 - beta2 / 2, beta2, 1e-8, 0.1}, 6, 0.37f);
    CompareOptimizers(
        11, [&](TypedSpan g, Shard& s) { return AdamWFp32(scalars, g, s.master(), s.adamw()); },
        [&](TypedSpan g, Shard& s) { reference::AdamWFp32(scalars, g, s.master(), s.adamw()); });
  }
}

TEST(SameBits, AdamW8Bit) {
  for (const Rounding rounding : {Rounding::kNoZero, Rounding::kNearest}) {
    const AdamWScalars scalars = PrepareAdamW({1e-3, 0.9, 0.999, 1e-8, 0.1}, 3, 0.37f);
    CompareOptimizers(
        12,
        [&](TypedSpan g, Shard& s) {
          return AdamW8Bit(scalars, g, s.master(), s.adamw_8bit(rounding));
        },
        [&](TypedSpan g, Shard& s) {
          reference::AdamW8Bit(scalars, g, s.master(), s.adamw_8bit(rounding));
        });
  }
}

TEST(SameBits, Sgd) {
  for (const SgdConfig& config : {SgdConfig{0.1, 0.9, 0.2, 1e-2, false},
                                  SgdConfig{0.1, 0.9, 0, 0, true}, SgdConfig{0.1, 0, 0, 1e-2}}) {
    for (const int64_t applied_count : {0, 1}) {
      const SgdScalars scalars = PrepareSgd(config, applied_count, 0.37f);
      const bool kept = config.momentum != 0;
      const auto fp32 = [&](Shard& s) { return kept ? s.sgd() : SgdFp32State{}; };
      const auto codes = [&](Shard& s) { return kept ? s.sgd_8bit() : Sgd8BitState{}; };
      CompareOptimizers(
          13, [&](TypedSpan g, Shard& s) { return SgdFp32(scalars, g, s.master(), fp32(s)); },
          [&](TypedSpan g, Shard& s) { reference::SgdFp32(scalars, g, s.master(), fp32(s)); });
      CompareOptimizers(
          14, [&](TypedSpan g, Shard& s) { return Sgd8Bit(scalars, g, s.master(), codes(s)); },
          [&](TypedSpan g, Shard& s) { reference::Sgd8Bit(scalars, g, s.master(), codes(s)); });
    }
  }
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
