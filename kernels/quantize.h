// 8-bit block quantisation on the dynamic map.
//   Source    Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022; the table of
//             bitsandbytes' create_dynamic_map.
//   Block     256 consecutive elements (the last block may be shorter) share absmax, their largest
//             magnitude, fp32.
//   Decode    value = code_book[code] * absmax, one fp32 product. absmax must be finite and >= 0.
//   Encode    The code of the code-book value nearest to r = x * (1 / absmax): one IEEE fp32
//             division per block, one product per element. Rounding says which of two values is
//             taken near their middle. If absmax is outside 2^-64 .. 2^64, x and absmax are first
//             multiplied by 2^64 or 2^-64. A block of zeros has absmax 0 and the code of 0
//             everywhere.
//   Special   An infinity saturates to +-FLT_MAX. A NaN gets the code of 0 and does not change
//             absmax, so one bad element does not affect its neighbours. In the unsigned book a
//             negative x is coded as 0.
//   Threads   no shared state; disjoint ranges of whole blocks may run at once. No overlap.
//   Status    InvalidArgument if counts differ; then nothing was written.
#pragma once
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/arithmetic.h"
#include "kernels/code_books.h"  // IWYU pragma: export
#include "kernels/types.h"

namespace orlop::kernels {

enum class CodeBook : uint8_t {
  kSigned,    // kSignedCodeBook: exp_avg, momentum_buffer
  kUnsigned,  // kUnsignedCodeBook: exp_avg_sq
};

enum class Rounding : uint8_t {
  // Nearest, except that a positive unsigned x is never coded as 0: below the middle of 0 and code
  // 1 it gets code 1. This is the default, because losing sqrt(v) of a small element divides its
  // update by almost nothing. The code's number k (code_books.h) is |r| * scale + bias of the
  // decade whose range holds |r|, computed by one fused multiply-add, limited to the decade's last
  // k, and rounded to the nearest integer, ties to even. It is the nearest value wherever r is
  // farther than 2^-14 of a gap from the middle of two values.
  kNoZero,
  // The codes of bitsandbytes' CUDA kernels: nearest, measured exactly; an exact tie gets the even
  // code. A signed x keeps its sign: a negative one (-0 too) that is nearest to 0 gets the code
  // below that of 0.
  kNearest,
  // Up or down with a probability that is linear between neighbouring entries (random.h), so that a
  // change smaller than half a gap is not lost on average. A positive unsigned x is never coded as
  // 0. QuantizeBlocks, which sets state from outside, uses kNoZero instead.
  kStochastic,
};

namespace quantize_internal {
// The factor by which a block is multiplied before it is coded, so that 1 / absmax is neither
// infinite nor inexact.
ORLOP_DEVICE constexpr float ScaleOf(float absmax) {
  return absmax < 0x1p-64f ? 0x1p64f : absmax > 0x1p64f ? 0x1p-64f : 1.0f;
}
}  // namespace quantize_internal

// Returns the rounding that QuantizeBlocks uses.
constexpr Rounding Deterministic(Rounding rounding) {
  return rounding == Rounding::kStochastic ? Rounding::kNoZero : rounding;
}

// Encodes values. codes: [count]; absmax: [BlockCount(count)].
absl::Status QuantizeBlocks(CodeBook code_book, Rounding rounding, absl::Span<const float> values,
                            absl::Span<uint8_t> codes, absl::Span<float> absmax);

// Like QuantizeBlocks, but values that DequantizeBlocks returned decode to the same bits again, so
// that state read as fp32 and set again is unchanged. Three times slower. QuantizeBlocks alone does
// not have this property: the signed book has no -1, so in a block whose largest magnitude is
// negative that value decodes to -0.993 absmax, and the next QuantizeBlocks takes this as the new
// absmax.
absl::Status RequantizeBlocks(CodeBook code_book, Rounding rounding, absl::Span<const float> values,
                              absl::Span<uint8_t> codes, absl::Span<float> absmax);

absl::Status DequantizeBlocks(CodeBook code_book, absl::Span<const uint8_t> codes,
                              absl::Span<const float> absmax, absl::Span<float> values);

// The same for the 4-bit maps (code_books4.h): 128-element blocks, two codes to a byte, the even
// element in the low half. codes: [(count + 1) / 2]; absmax: [FourBitBlockCount(count)].
absl::Status RequantizeBlocks4(CodeBook code_book, Rounding rounding,
                               absl::Span<const float> values, absl::Span<uint8_t> codes,
                               absl::Span<float> absmax);
absl::Status DequantizeBlocks4(CodeBook code_book, absl::Span<const uint8_t> codes,
                               absl::Span<const float> absmax, absl::Span<float> values);

}  // namespace orlop::kernels
