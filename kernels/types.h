// Types shared by every kernel: bit patterns, element types, and the one arithmetic that all
// follow.
//
// The arithmetic (kArithmeticVersion) gives the same bits on every instruction set. Its rules:
//   - A product that is added to a number is always one fused multiply-add, written out; compilers
//     contract nothing else (-ffp-contract=off). Instruction sets without fused multiply-add run
//     the scalar reference, which uses std::fma.
//   - Division and square root are IEEE, correctly rounded; reciprocal estimates are not used.
//   - Sums run in a stated order; a maximum needs none.
//   - Every NaN that a kernel writes is canonical: 0x7FC00000, 0x7FC0 (bf16), 0x7E00 (fp16).
//   - Threads that call kernels keep the default floating-point environment: round to nearest,
//     subnormals kept (no flush-to-zero).
#pragma once
#include <cstddef>
#include <cstdint>

namespace orlop::kernels {

// Increased whenever an output bit of any kernel may change. Stored in decisions and snapshots.
//   2  codes are computed from x * (1 / absmax), one division per block; version 1 divided each
//      element
//   3  8-bit codes by Rounding::kNoZero are computed from k in fp32, not measured exactly; steps of
//      4-bit state use kStochastic instead of it
//   4  rmsprop_full leaves its momentum as it is in a step without momentum, and its average of
//      gradients in a step that is not centered; version 3 updated both
inline constexpr uint32_t kArithmeticVersion = 4;

// Consecutive elements of a flattened tensor that share one absmax and one partial sum.
inline constexpr size_t kQuantBlock = 256;

// Returns the number of blocks that cover `count` elements; the last one may be short.
constexpr size_t BlockCount(size_t count) {
  return count / kQuantBlock + (count % kQuantBlock != 0);
}

// Element type of gradients, and of weights as workers see them.
enum class DType : uint8_t { kF32, kBF16, kF16 };

constexpr size_t SizeOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// `count` elements of `dtype`, contiguous, in host byte order. The alignment may be any, so that a
// payload can be read where it was received. Not owned.
struct TypedSpan {
  DType dtype = DType::kF32;
  const void* data = nullptr;
  size_t count = 0;
};

// Returns elements begin .. begin + count of `span`, or those of them that exist. begin <=
// span.count.
inline TypedSpan Slice(TypedSpan span, size_t begin, size_t count) {
  const size_t left = span.count - begin;
  return {span.dtype, static_cast<const char*>(span.data) + begin * SizeOf(span.dtype),
          count < left ? count : left};
}

}  // namespace orlop::kernels
