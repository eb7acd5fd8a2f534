// For the tests of kernels: seeded data with hostile values, and a loop over instruction sets.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/targets.h"
#include "kernels/types.h"

namespace orlop::kernels::testing {

// Runs `body` once per instruction set of this machine, and names it in every failure.
inline void ForEachTarget(const std::function<void()>& body) {
  for (const int64_t target : SupportedTargets()) {
    SCOPED_TRACE(TargetName(target));
    const ScopedTarget scoped(target);
    body();
  }
}

// Compares bytes, those of NaN included.
template <class T>
::testing::AssertionResult SameBits(const std::vector<T>& actual, const std::vector<T>& expected) {
  if (actual.size() != expected.size()) return ::testing::AssertionFailure() << "sizes differ";
  for (size_t i = 0; i < actual.size(); ++i) {
    // NOLINTNEXTLINE(bugprone-suspicious-memory-comparison): floats with other bits differ
    if (std::memcmp(&actual[i], &expected[i], sizeof(T)) != 0) {
      return ::testing::AssertionFailure() << "element " << i << " of " << actual.size() << " is "
                                           << +actual[i] << ", expected " << +expected[i];
    }
  }
  return ::testing::AssertionSuccess();
}

inline float FloatOf(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t BitsOf(float value) { return std::bit_cast<uint32_t>(value); }

enum class Hostility { kTame, kHeavyTailed, kAnyBits };

class Source {
 public:
  explicit Source(uint64_t seed) : generator_(seed) {
    ::testing::Test::RecordProperty("seed", static_cast<int>(seed));
  }

  uint32_t Bits() { return static_cast<uint32_t>(generator_()); }
  double Normal() { return normal_(generator_); }

  // kTame: N(0, 0.01). kHeavyTailed: signs times lognormal(3), zeros, and one outlier in a hundred.
  // kAnyBits: every fp32 pattern: NaN, infinities, subnormals.
  float Float(Hostility hostility) {
    if (hostility == Hostility::kTame) return static_cast<float>(0.01 * Normal());
    if (hostility == Hostility::kAnyBits) return FloatOf(Bits());
    const uint32_t kind = Bits() % 100;
    if (kind < 5) return kind < 2 ? -0.0f : 0.0f;
    const double magnitude = std::exp(3 * Normal()) * (kind == 99 ? 1e12 : 1e-3);
    return static_cast<float>(kind % 2 == 0 ? magnitude : -magnitude);
  }

  std::vector<float> Floats(size_t count, Hostility hostility) {
    std::vector<float> values(count);
    for (float& value : values) value = Float(hostility);
    return values;
  }

  template <class T>
  std::vector<T> Integers(size_t count) {
    std::vector<T> values(count);
    for (T& value : values) value = static_cast<T>(Bits());
    return values;
  }

  // Returns values that a stored absmax may have: finite and not negative, from 0 and subnormals to
  // nearly overflow.
  std::vector<float> Absmax(size_t count, Hostility hostility) {
    std::vector<float> values = Floats(count, hostility);
    for (float& value : values) value = std::isfinite(value) ? std::fabs(value) : 0;
    return values;
  }

 private:
  std::mt19937_64 generator_;
  std::normal_distribution<double> normal_;
};

// `count` elements of `dtype` that start one byte into an allocation, so that no type is aligned.
class OddlyAligned {
 public:
  OddlyAligned(Source& source, DType dtype, size_t count, Hostility hostility)
      : dtype_(dtype), count_(count), bytes_(1 + count * SizeOf(dtype)) {
    for (size_t i = 0; i < count; ++i) {
      const float value = source.Float(hostility);
      const uint32_t bits = BitsOf(value);
      const bool any = dtype == DType::kBF16 || hostility == Hostility::kAnyBits;
      const uint16_t half = static_cast<uint16_t>(any ? bits >> 16 : 0x2000 + bits % 4096);
      std::memcpy(&bytes_[1 + i * SizeOf(dtype)],
                  dtype == DType::kF32 ? static_cast<const void*>(&bits) : &half, SizeOf(dtype));
    }
  }
  TypedSpan span() const { return {dtype_, bytes_.data() + 1, count_}; }

 private:
  DType dtype_;
  size_t count_;
  std::vector<uint8_t> bytes_;
};

// Every count from 0 to 513. ORLOP_TAIL_STRIDE=n keeps one in n, from ORLOP_TAIL_SEED on, and the
// counts near the end of a block.
inline const std::vector<size_t>& Tails() {
  static const std::vector<size_t> counts = [] {
    const auto number = [](const char* name, uint64_t otherwise) {
      const char* text = std::getenv(name);
      return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
    };
    const uint64_t stride = std::max<uint64_t>(number("ORLOP_TAIL_STRIDE", 1), 1);
    const uint64_t first = number("ORLOP_TAIL_SEED", 0) % stride;
    std::vector<size_t> list;
    for (size_t count = 0; count <= 513; ++count) {
      const bool about_an_end = count % 256 <= 1 || count % 256 == 255;
      if (count % stride == first || about_an_end) list.push_back(count);
    }
    return list;
  }();
  return counts;
}

inline constexpr DType kAllTypes[] = {DType::kF32, DType::kBF16, DType::kF16};
inline constexpr Hostility kAllHostilities[] = {Hostility::kTame, Hostility::kHeavyTailed,
                                                Hostility::kAnyBits};

}  // namespace orlop::kernels::testing
