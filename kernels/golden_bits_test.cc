// Compares digests of every kernel's output with constants. same_bits_test.cc compares the
// instruction sets of one machine; this test compares machines (x86, AArch64) and versions of the
// code. A constant may change only when kArithmeticVersion is raised. Input values are built from
// integers and scalars are literals, so no maths library influences them.
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
#include "kernels/code_books4.h"
#include "kernels/optimizer.h"
#include "kernels/quantize.h"
#include "kernels/random.h"
#include "kernels/reduce.h"
#include "kernels/reference.h"
#include "kernels/testing/test_data.h"
#include "kernels/testing/test_range.h"
#include "kernels/types.h"

namespace orlop::kernels {
namespace {

using testing::AllFormats;
using testing::FloatOf;
using testing::ForEachTarget;
using testing::Formats;
using testing::kAllTypes;
using testing::Range;

constexpr uint64_t kSeed = 2024;
constexpr size_t kCount = 5 * kQuantBlock + 77;
constexpr int kSteps = 3;

// Computes the 64-bit FNV-1a hash of the bytes of all arrays added.
class Digest {
 public:
  template <class T>
  void Add(const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i) {
      value_ = (value_ ^ bytes[i]) * 0x100000001b3u;
    }
  }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325u;
};

// Generates random numbers by SplitMix64.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed) {}
  uint32_t Bits() { return static_cast<uint32_t>(Mix64(state_ += 0x9e3779b97f4a7c15u) >> 32); }

  // Returns the bits of one random number of `dtype`, in the low bits. The number of its block
  // selects the kind of number, of both signs; bounds are for magnitudes, the upper one excluded:
  //   block % 5   fp32 and bf16                                  fp16
  //   0           2^-10 to 2^-3                                  2^-7 to 1
  //   1           2^-77 to 2^77, and one zero in 16              any bits
  //   2           any bits, NaN and infinity included            any bits
  //   3           subnormals                                     subnormals
  //   4           zeros                                          zeros
  uint32_t Of(DType dtype, size_t block) {
    const uint32_t bits = Bits();
    const uint32_t sign_and_fraction = bits & 0x807FFFFFu, draw = Bits();
    const uint32_t exponent = block % 5 == 0 ? 117 + draw % 7 : 50 + draw % 154;
    uint32_t value = sign_and_fraction | exponent << 23;
    if (block % 5 == 2) value = bits;
    if (block % 5 == 3) value = sign_and_fraction;
    if (block % 5 == 4 || (block % 5 == 1 && draw % 16 == 0)) value = bits & 0x80000000u;
    if (dtype == DType::kF32) return value;
    if (dtype == DType::kBF16) return value >> 16;
    if (block % 5 == 0) return (value >> 16 & 0x83FFu) | (8 + draw % 7) << 10;
    return block % 5 < 3 ? bits >> 16 : value >> 16 & 0x83FFu;  // subnormals and zeros
  }
  // Returns `count` numbers of fp32 in blocks of kQuantBlock. Typed returns the same in any type,
  // as bytes in little-endian order.
  std::vector<float> Floats(size_t count) {
    std::vector<float> values(count);
    for (size_t i = 0; i < count; ++i) values[i] = FloatOf(Of(DType::kF32, i / kQuantBlock));
    return values;
  }
  std::vector<uint8_t> Typed(DType dtype, size_t count) {
    std::vector<uint8_t> bytes(count * SizeOf(dtype));
    for (size_t i = 0; i < count; ++i) {
      const uint32_t bits = Of(dtype, i / kQuantBlock);
      std::memcpy(&bytes[i * SizeOf(dtype)], &bits, SizeOf(dtype));
    }
    return bytes;
  }
  template <class T>
  std::vector<T> Integers(size_t count) {
    std::vector<T> values(count);
    for (T& value : values) value = static_cast<T>(Bits());
    return values;
  }

 private:
  uint64_t state_;
};

// ---- Optimizers ----

struct Golden {
  const char* optimizer;
  uint64_t digest;
  // Each variant is one set of StepScalars without the gradient scale: the mask of the states to
  // round stochastically, then the fields of Scalars in kernels/optimizers/NAME.h, in order.
  std::vector<std::vector<float>> scalars;
};

// An optimizer that is missing here is not compared between machines. The test prints how many of
// all optimizers are listed.
const std::vector<Golden>& AllGolden() {
  static const std::vector<Golden> all = {
      {"adamw",
       0xdc95971d9a3ede3a,
       {{0, 0.9f, 0.1f, 0.999f, 0.001f, 1e-8f, 1e-2f, 31.6f, 1e-4f},
        {2, 0.3f, 0.7f, 0.9999f, 0.0001f, 0, 1.4e-3f, 70.7f, 1e-5f}}},
      {"adam",
       0x0bb9929cb4faef0b,
       {{0, 0.9f, 0.1f, 0.999f, 0.001f, 1e-8f, 1e-2f, 31.6f, 1e-2f},
        {3, 0.9995f, 0.0005f, 0, 1, 1e-6f, 1.4e-3f, 1, 0}}},
      {"adamw_bnb",
       0xaef61ef62b9c7330,
       {{0, 0.9f, 0.1f, 0.999f, 0.001f, 3.2e-10f, 3.2e-4f, 0.9999f},
        {0, 0, 1, 0.3f, 0.7f, 0, 1e-3f, 1}}},
      {"sgd",
       0xbd70afff590544f7,
       {{0, 1e-3f, 0, 1, 1e-2f, 0, 1},
        {0, 1e-3f, 0.9f, 0.8f, 1e-2f, 0, 0},
        {1, 1e-1f, 0.9995f, 1, 0, 1, 0},
        {0, 1e-3f, 0.9f, 1, 0, 1, 1}}},
      {"lion",
       0xe7d3876480c87e48,
       {{0, 0.9f, 0.1f, 0.99f, 0.01f, 1e-4f, 1e-5f}, {1, 0, 1, 0.4f, 0.6f, 1e-3f, 0}}},
      {"adagrad", 0xdcb4d7e1a17e4abf, {{0, 1e-2f, 1e-2f, 1e-10f, 0.1f}, {1, 5e-3f, 0, 0, 0}}},
      {"rmsprop",
       0xa7b9576fc9641cd7,
       {{0, 1e-2f, 0.99f, 0.01f, 1e-8f, 1e-2f}, {1, 1e-3f, 0.2f, 0.8f, 0, 0}}},
      {"rmsprop_full",
       0xf32c91c678e6cca3,
       {{0, 1e-2f, 0.99f, 0.01f, 1e-8f, 1e-2f, 0.9f, 1},
        {5, 1e-3f, 0.9995f, 0.0005f, 1e-8f, 0, 0.5f, 0}}},
      {"ademamix",
       0x0069519fffdbc993,
       {{2, 0.9f, 0.1f, 0.999f, 0.001f, 0.9999f, 0.0001f, 10, 31.6f, 5, 1e-8f, 1e-3f, 1e-5f},
        {0, 0.3f, 0.7f, 0, 1, 0.9f, 0.1f, 1.1f, 1, 0.5f, 0, 1e-2f, 0}}},
      {"lamb",
       0x139f838f732b360e,
       {{0, 0.9f, 0.1f, 0.999f, 0.001f, 1e-6f, 1e-2f, 10, 31.6f, 2e-3f},
        {2, 0.3f, 0.7f, 0.9999f, 0.0001f, 0, 0, 1.4f, 70.7f, 1e-2f}}},
      {"adafactor",
       0x53ad96daede85b90,
       {{0, 0.574f, 0.426f, 1.42e-14f, 1.19e-7f, 1e-3f, 1, 1e-3f, 1e-4f, 0},
        {0, 0.574f, 0.426f, 1e-6f, 1e-3f, 1e-3f, 2, 0, 1e-3f, 1}}},
      {"muon",
       0x167033765b651c8e,
       {{0, 0.95f, 0.05f, 1, 1e-4f, 2e-2f, 0, 3.4445f, -4.775f, 2.0315f, 1e-7f, 5},
        {1, 0.3f, 0.7f, 0, 0, 1e-3f, 1, 2, -1.5f, 0.5f, 0, 1}}},
      {"store", 0x46d1e8ef3174a6e1, {{0}}},
  };
  return all;
}

// Returns a range of kCount elements with random master weights and states. A state with an
// unsigned code book gets no negative value.
Range NewRange(Numbers& numbers, const Optimizer* optimizer, Formats formats) {
  Range range(optimizer, formats, numbers.Floats(kCount));
  for (size_t s = 0; s < optimizer->states.size(); ++s) {
    const bool is_signed = optimizer->states[s].code_book == CodeBook::kSigned;
    const uint32_t kept = is_signed ? 0xFFFFFFFFu : 0x7FFFFFFFu;
    range.fp32[s] = numbers.Floats(kCount);
    for (float& value : range.fp32[s]) value = FloatOf(testing::BitsOf(value) & kept);
    range.codes[s] = numbers.Integers<uint8_t>(kCount);
    // An absmax must be finite and not negative. Halving the bits of an infinity or NaN makes it
    // finite.
    for (size_t i = 0; i < range.absmax[s].size(); ++i) {
      const uint32_t bits = numbers.Of(DType::kF32, i) & 0x7FFFFFFFu;
      range.absmax[s][i] = FloatOf(bits < 0x7F800000u ? bits : bits >> 1);
    }
  }
  range.input = numbers.Floats(range.input.size());
  range.row_factors = numbers.Floats(range.row_factors.size());
  range.column_factors = numbers.Floats(range.column_factors.size());
  return range;
}

// Runs kSteps steps, one for each gradient dtype, for every variant in every format, and returns
// the digest of the resulting weights, remainders and states.
uint64_t DigestOf(const Golden& golden, const Optimizer* optimizer,
                  absl::Status (*step)(const RangeStep&)) {
  Numbers numbers(kSeed);
  Digest digest;
  for (const std::vector<float>& own : golden.scalars) {
    StepScalars scalars;
    scalars.values[scalars.count++] = 0.37f;  // the gradient scale
    for (const float scalar : own) scalars.values[scalars.count++] = scalar;
    EXPECT_EQ(scalars.count, optimizer->scalar_count) << optimizer->name;
    for (const Formats& formats : AllFormats()) {
      Range range = NewRange(numbers, optimizer, formats);
      for (int i = 0; i < kSteps; ++i) {
        const DType dtype = kAllTypes[i % 3];
        const std::vector<uint8_t> gradient = numbers.Typed(dtype, kCount);
        const absl::Status status =
            step(range.StepOf(scalars, {dtype, gradient.data(), kCount}, static_cast<uint64_t>(i)));
        EXPECT_TRUE(status.ok()) << status;
      }
      digest.Add(range.weight);
      digest.Add(range.remainder);
      for (size_t s = 0; s < optimizer->states.size(); ++s) {
        digest.Add(range.fp32[s]);
        digest.Add(range.codes[s]);
        digest.Add(range.absmax[s]);
      }
    }
  }
  return digest.value();
}

std::string Hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof(text), "0x%016llx", static_cast<unsigned long long>(value));
  return text;
}

absl::Status ReferenceStep(const RangeStep& step) {
  reference::Step(step);
  return absl::OkStatus();
}

TEST(GoldenBits, OfEveryOptimizerInEveryFormat) {
  size_t elements = 0;
  for (const Golden& golden : AllGolden()) {
    const Optimizer* optimizer = FindOptimizer(golden.optimizer);
    ASSERT_NE(optimizer, nullptr) << golden.optimizer;
    elements += golden.scalars.size() * AllFormats().size() * kSteps * kCount;
    ForEachTarget([&] {
      EXPECT_EQ(Hex(DigestOf(golden, optimizer, Step)), Hex(golden.digest)) << golden.optimizer;
    });
    EXPECT_EQ(Hex(DigestOf(golden, optimizer, ReferenceStep)), Hex(golden.digest))
        << golden.optimizer << " in the reference";
  }
  std::printf("%zu elements on each instruction set, %zu of %zu optimizers, seed %d\n", elements,
              AllGolden().size(), OptimizerUnits().size(), static_cast<int>(kSeed));
}

// ---- The other kernels ----

void ExpectDigest(const Digest& digest, uint64_t expected) {
  EXPECT_EQ(Hex(digest.value()), Hex(expected));
}

TEST(GoldenBits, OfCastsAndMasters) {
  ForEachTarget([] {
    Numbers numbers(kSeed + 1);
    Digest digest;
    for (int round = 0; round < 8; ++round) {
      const std::vector<float> values = numbers.Floats(kCount);
      std::vector<uint16_t> half(kCount), weight(kCount);
      std::vector<int16_t> remainder(kCount);
      std::vector<int8_t> short_remainder(kCount);
      std::vector<float> wide(kCount);
      ASSERT_TRUE(RoundToBF16(values, absl::MakeSpan(half)).ok());
      digest.Add(half);
      ASSERT_TRUE(RoundToF16(values, absl::MakeSpan(half)).ok());
      digest.Add(half);
      ASSERT_TRUE(RoundToBF16Away(values, absl::MakeSpan(half)).ok());
      digest.Add(half);
      ASSERT_TRUE(
          SplitMaster24(values, absl::MakeSpan(weight), absl::MakeSpan(short_remainder)).ok());
      digest.Add(weight);
      digest.Add(short_remainder);
      ASSERT_TRUE(SplitMaster(values, absl::MakeSpan(weight), absl::MakeSpan(remainder)).ok());
      digest.Add(weight);
      digest.Add(remainder);
      weight = numbers.Integers<uint16_t>(kCount);
      remainder = numbers.Integers<int16_t>(kCount);
      ASSERT_TRUE(JoinMaster(weight, remainder, absl::MakeSpan(wide)).ok());
      digest.Add(wide);
      F16Overflow overflow;
      ASSERT_TRUE(JoinMasterToF16(weight, remainder, absl::MakeSpan(half), &overflow).ok());
      digest.Add(half);
      digest.Add(std::vector<uint64_t>{overflow.count, overflow.first_index});
    }
    ExpectDigest(digest, 0x344217e770c67c81);
  });
}

TEST(GoldenBits, OfWideningReducingAndAccumulating) {
  ForEachTarget([] {
    Numbers numbers(kSeed + 2);
    Digest digest;
    for (int round = 0; round < 8; ++round) {
      for (const DType dtype : kAllTypes) {
        const std::vector<uint8_t> bytes = numbers.Typed(dtype, kCount);
        const TypedSpan gradient{dtype, bytes.data(), kCount};
        std::vector<float> values(kCount);
        ASSERT_TRUE(WidenToF32(gradient, absl::MakeSpan(values)).ok());
        digest.Add(values);
        values = numbers.Floats(kCount);
        ASSERT_TRUE(AccumulateToF32(gradient, absl::MakeSpan(values)).ok());
        digest.Add(values);
        BlockSums sums;
        ReduceGradient(gradient, &sums);
        digest.Add(std::vector<double>{sums.sum_squares});
        digest.Add(std::vector<uint64_t>{sums.nonfinite_count});
      }
    }
    ExpectDigest(digest, 0x64e2300b18423eec);
  });
}

TEST(GoldenBits, OfQuantisation) {
  ForEachTarget([] {
    Numbers numbers(kSeed + 3);
    Digest digest;
    const auto add = [&](auto quantize, auto dequantize, CodeBook book, Rounding rounding,
                         size_t code_count, size_t absmax_count) {
      const std::vector<float> values = numbers.Floats(kCount);
      std::vector<uint8_t> codes(code_count);
      std::vector<float> absmax(absmax_count), back(kCount);
      ASSERT_TRUE(
          quantize(book, rounding, values, absl::MakeSpan(codes), absl::MakeSpan(absmax)).ok());
      ASSERT_TRUE(dequantize(book, codes, absmax, absl::MakeSpan(back)).ok());
      digest.Add(codes);
      digest.Add(absmax);
      digest.Add(back);
    };
    for (int round = 0; round < 8; ++round) {
      for (const CodeBook book : {CodeBook::kSigned, CodeBook::kUnsigned}) {
        for (const Rounding rounding : {Rounding::kNoZero, Rounding::kNearest}) {
          const size_t scales = BlockCount(kCount);
          add(QuantizeBlocks, DequantizeBlocks, book, rounding, kCount, scales);
          add(RequantizeBlocks, DequantizeBlocks, book, rounding, kCount, scales);
          add(RequantizeBlocks4, DequantizeBlocks4, book, rounding, (kCount + 1) / 2,
              FourBitBlockCount(kCount));
        }
      }
    }
    ExpectDigest(digest, 0xc29c95628d300e8b);
  });
}

}  // namespace
}  // namespace orlop::kernels
