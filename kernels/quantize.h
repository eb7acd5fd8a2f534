// 8-bit block quantisation on the dynamic map.
//   Source    Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022; the table of
//             bitsandbytes' create_dynamic_map.
//   Block     256 consecutive elements (the last block: what is left) share absmax, their largest
//             magnitude, fp32.
//   Decode    value = code_book[code] * absmax, one fp32 product. absmax must be finite and >= 0.
//   Encode    code of the code-book value nearest to r = x * (1 / absmax): one IEEE fp32 division
//             per block, one product per element. What nearest means beside the middle of two
//             values: Rounding. Where absmax is outside 2^-64 .. 2^64, x and absmax are first
//             multiplied by 2^64 or 2^-64. A block of zeros has absmax 0 and the code of 0
//             everywhere.
//   Special   an infinity saturates to +-FLT_MAX; a NaN gets the code of 0 and does not touch
//             absmax, so one bad element leaves its neighbours alone. Unsigned: a negative x is
//             coded as 0.
//   Threads   no shared state; disjoint ranges of whole blocks may run at once. No overlap.
//   Status    InvalidArgument if counts differ; then nothing was written.
#pragma once
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/arithmetic.h"
#include "kernels/code_books.h"
#include "kernels/types.h"

namespace orlop::kernels {

enum class CodeBook : uint8_t {
  kSigned,    // kSignedCodeBook: exp_avg, momentum_buffer
  kUnsigned,  // kUnsignedCodeBook: exp_avg_sq
};

enum class Rounding : uint8_t {
  // Nearest, but a positive unsigned x is never coded as 0: below the middle of 0 and code 1 it
  // gets code 1. The default: losing sqrt(v) of a small element divides its update by almost
  // nothing. The number k (code_books.h) is |r| * scale + bias of the decade whose range holds |r|,
  // one fused multiply-add, up to the decade's last, rounded to the nearest whole number, ties to
  // even. That is the nearest value wherever r is farther than 2^-14 of a gap from the middle of
  // two.
  kNoZero,
  // The codes of bitsandbytes' CUDA kernels: nearest, measured exactly; an exact tie goes to the
  // even code. A signed x keeps its sign: a negative one (-0 too) that is nearest to 0 gets the
  // code below it.
  kNearest,
  // Up or down with a probability linear between neighbouring entries (random.h), so that a change
  // smaller than half a gap is not lost on average. A positive unsigned x is never coded as 0.
  // QuantizeBlocks, which sets state from outside, takes it for kNoZero.
  kStochastic,
};

namespace quantize_internal {
// What a block is multiplied by before it is coded, so that 1 / absmax is neither infinite nor
// inexact.
ORLOP_DEVICE constexpr float ScaleOf(float absmax) {
  return absmax < 0x1p-64f ? 0x1p64f : absmax > 0x1p64f ? 0x1p-64f : 1.0f;
}
}  // namespace quantize_internal

// What QuantizeBlocks makes of a rounding.
constexpr Rounding Deterministic(Rounding rounding) {
  return rounding == Rounding::kStochastic ? Rounding::kNoZero : rounding;
}

// codes: [count]; absmax: [BlockCount(count)].
absl::Status QuantizeBlocks(CodeBook code_book, Rounding rounding, absl::Span<const float> values,
                            absl::Span<uint8_t> codes, absl::Span<float> absmax);

// As QuantizeBlocks, but values that DequantizeBlocks made are decoded to the same bits again, so
// that state read as fp32 and set again is the same state. Three times slower.
//   QuantizeBlocks alone loses a signed block whose largest magnitude is negative: the book has no
//   -1, so that value comes back as -0.993 absmax, which then is taken for the new absmax.
absl::Status RequantizeBlocks(CodeBook code_book, Rounding rounding, absl::Span<const float> values,
                              absl::Span<uint8_t> codes, absl::Span<float> absmax);

absl::Status DequantizeBlocks(CodeBook code_book, absl::Span<const uint8_t> codes,
                              absl::Span<const float> absmax, absl::Span<float> values);

// The 4-bit maps (code_books4.h): 128-element blocks, two codes to a byte, the even element in the
// low half. codes: [(count + 1) / 2]; absmax: [FourBitBlockCount(count)]. The rest as above.
absl::Status RequantizeBlocks4(CodeBook code_book, Rounding rounding,
                               absl::Span<const float> values, absl::Span<uint8_t> codes,
                               absl::Span<float> absmax);
absl::Status DequantizeBlocks4(CodeBook code_book, absl::Span<const uint8_t> codes,
                               absl::Span<const float> absmax, absl::Span<float> values);

}  // namespace orlop::kernels
