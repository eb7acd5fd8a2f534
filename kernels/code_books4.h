// The 4-bit code books, for blocks of 128 elements. Source: torchao's optim/quant_utils.py, after
// Li, Chen and Zhu, Memory Efficient Optimizers with 4-bit States, 2023.
//   signed    the dynamic map with three decades of 1, 2 and 4 magnitudes, 0 (code 7) and 1.0
//             (code 15)
//   unsigned  k / 16, k = 1..16 = code + 1: linear, without 0
#pragma once
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "kernels/code_books.h"

namespace orlop::kernels {

inline constexpr size_t kFourBitBlock = 128;
constexpr size_t FourBitBlockCount(size_t count) {
  return count / kFourBitBlock + (count % kFourBitBlock != 0);
}
inline constexpr uint8_t kSigned4ZeroCode = 7;
inline constexpr uint8_t kUnsigned4LeastCode = 0;

namespace code_book_internal {

// (0.1 + 0.9 (j + 0.5) / n) * 10^(decade - 2) = (18 j + 9 + 2 n) / (20 n * 10^(2 - decade)),
// n = 2^decade
constexpr std::array<float, 16> MakeSigned4() {
  std::array<float, 16> book{};
  book[15] = 1;
  int k = 1;
  for (int decade = 0; decade < 3; ++decade) {
    const int n = 1 << decade;
    for (int j = 0; j < n; ++j, ++k) {
      const int power = decade == 0 ? 100 : decade == 1 ? 10 : 1;
      const float value =
          static_cast<float>(18 * j + 9 + 2 * n) / static_cast<float>(20 * n * power);
      book[kSigned4ZeroCode + k] = value;
      book[kSigned4ZeroCode - k] = -value;
    }
  }
  return book;
}

constexpr std::array<float, 16> MakeUnsigned4() {
  std::array<float, 16> book{};
  for (int code = 0; code < 16; ++code) book[code] = static_cast<float>(code + 1) / 16;
  return book;
}

// thresholds[c] is the smallest fp32 that is nearer to entry c than to the one below it, or equally
// near if c is even. Every value reaches entry 0.
constexpr std::array<float, 16> MakeThresholds4(const std::array<float, 16>& book) {
  std::array<float, 16> thresholds{};
  thresholds[0] = -2;
  for (int code = 1; code < 16; ++code) {
    const double middle = (static_cast<double>(book[code - 1]) + book[code]) / 2;
    float least = static_cast<float>(middle);
    const bool reached = least > middle || (least == middle && code % 2 == 0);
    if (!reached) {  // step to the next fp32
      const uint32_t bits = std::bit_cast<uint32_t>(least);
      least = least == 0 ? std::bit_cast<float>(1u)
                         : std::bit_cast<float>(least > 0 ? bits + 1 : bits - 1);
    }
    thresholds[code] = least;
  }
  return thresholds;
}

constexpr std::array<float, 16> MakeInverseGaps4(const std::array<float, 16>& book) {
  std::array<float, 16> gaps{};
  for (int code = 0; code < 15; ++code) gaps[code] = 1 / (book[code + 1] - book[code]);
  return gaps;
}

}  // namespace code_book_internal

alignas(64) inline constexpr std::array<float, 16> kSigned4CodeBook =
    code_book_internal::MakeSigned4();
alignas(64) inline constexpr std::array<float, 16> kUnsigned4CodeBook =
    code_book_internal::MakeUnsigned4();
alignas(64) inline constexpr std::array<float, 16> kSigned4Thresholds =
    code_book_internal::MakeThresholds4(kSigned4CodeBook);
// 1 / (entry c + 1 - entry c); 0 for the last.
alignas(64) inline constexpr std::array<float, 16> kSigned4InverseGaps =
    code_book_internal::MakeInverseGaps4(kSigned4CodeBook);

}  // namespace orlop::kernels
