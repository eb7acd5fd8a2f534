// int8 with block scales: gradients and weights on a slow wire, 1.016 bytes per element
// (v1::DTYPE_I8_BLOCK), and the error feedback that keeps the rounding error of the codes.
//
//   Layout    A block is 256 consecutive elements of a piece, counted from its start: an fp32
//             scale, little endian, then an int8 code per element. A short last block of n elements
//             has 4 + n bytes.
//   Encode    scale = absmax / 127, one IEEE division; code = x / scale (IEEE), rounded to the
//             nearest integer, ties to even, clamped to -127..127. If scale is 0 (absmax is 0, or
//             so small that the division gives 0), all codes are 0. A block with a NaN or an
//             infinity has scale 0x7FC00000 and codes 0.
//   Decode    bf16(code * scale): an fp32 product rounded to nearest, ties to even. A NaN or
//             infinite scale makes every element of its block NaN (0x7FC0), so that the veto finds
//             it. A subnormal scale is valid, and so is the code -128, which Encode never writes. A
//             scale with its sign bit set is refused, unless it is NaN.
//   Feedback  x = fma(residual, loss_scale, gradient) is encoded in place of the gradient, and next
//             = bf16((x - decoded) * (1 / loss_scale)). The residual is unscaled, so the loss scale
//             may change between steps. It takes 2 bytes per element. It is NaN where x is not
//             finite or decodes to infinity; such a gradient makes its step a SKIP, after which the
//             caller keeps the old `residual`.
//   Threads   no shared state; disjoint ranges of whole blocks may run at once. Spans must not
//             overlap.
//   Source    1-bit SGD (Seide et al., 2014) and EF-SGD (Karimireddy et al., 2019), at 8 bits.
#pragma once
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/types.h"

namespace orlop::kernels {

inline constexpr size_t kInt8BlockBytes = sizeof(float) + kQuantBlock;

// Returns the encoded bytes of `count` elements.
constexpr size_t Int8Bytes(size_t count) { return count + BlockCount(count) * sizeof(float); }
// Returns the number of elements that encode to `bytes`, which must be the size of some count.
constexpr size_t Int8Count(size_t bytes) {
  return bytes - (bytes + kInt8BlockBytes - 1) / kInt8BlockBytes * sizeof(float);
}

// Both residuals are bf16, one per element.
struct ErrorFeedback {
  // The factor in the gradient. It and its inverse must be normal fp32 numbers.
  float loss_scale = 1;
  // The error that was not sent up to the last applied step.
  absl::Span<const uint16_t> residual;
  // Output: the residual after this step, if it is applied.
  absl::Span<uint16_t> next;
};

// Encodes source.count elements. `feedback` may be null. Status: InvalidArgument if counts differ
// (`wire` must have Int8Bytes(source.count)); then nothing was written.
absl::Status EncodeInt8(TypedSpan source, const ErrorFeedback* feedback, absl::Span<uint8_t> wire);

// Decodes values.size() elements to bf16. Status: InvalidArgument if counts differ, or if a scale
// has its sign bit set (the message has the block's index in `wire`); then nothing was written.
absl::Status DecodeInt8(absl::Span<const uint8_t> wire, absl::Span<uint16_t> values);

}  // namespace orlop::kernels
