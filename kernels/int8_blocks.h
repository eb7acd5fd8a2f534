// int8 with block scales: gradients and weights on a slow wire, 1.016 bytes per element
// (v1::DTYPE_I8_BLOCK), and the error feedback that keeps what the codes lose.
//
//   Layout    per 256 consecutive elements of a piece, counted from its start: an fp32 scale,
//   little
//             endian, then an int8 code per element. A short last block of n elements has 4 + n
//             bytes.
//   Encode    scale = absmax / 127, one IEEE division; code = x / scale (IEEE), rounded to the
//             nearest integer, ties to even, clamped to -127..127. Where scale is 0 (absmax 0, or
//             so small that the division gives 0) all codes are 0. A block with a NaN or an
//             infinity has the scale 0x7FC00000 and codes 0.
//   Decode    bf16(code * scale): an fp32 product rounded to nearest, ties to even. A scale that is
//             NaN or infinite makes every element of its block NaN (0x7FC0), so that the veto sees
//             it. A subnormal scale is a number like others, and so is the code -128, which Encode
//             does not write. A scale with its sign bit set is refused, NaN excepted.
//   Feedback  x = fma(residual, loss_scale, gradient) is encoded in the gradient's place, and
//             next = bf16((x - decoded) * (1 / loss_scale)): in unscaled terms, so that the loss
//             scale may change between steps. 2 bytes per element. NaN where x is not finite or
//             decodes to infinity: such a gradient makes its step a SKIP, which keeps `residual`.
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

// Encoded bytes of `count` elements.
inline constexpr size_t Int8Bytes(size_t count) {
  return count + BlockCount(count) * sizeof(float);
}
// The inverse, where `bytes` is the encoded size of some count.
inline constexpr size_t Int8Count(size_t bytes) {
  return bytes - (bytes + kInt8BlockBytes - 1) / kInt8BlockBytes * sizeof(float);
}

// Both residuals are bf16, one per element.
struct ErrorFeedback {
  float loss_scale = 1;                 // as the gradient has; normal, and its inverse too
  absl::Span<const uint16_t> residual;  // what was not sent up to the last step that was applied
  absl::Span<uint16_t> next;            // written: what it will be if this step is
};

// Encodes source.count elements; `feedback` may be null. Status: InvalidArgument if counts differ
// (wire: Int8Bytes(source.count)); then nothing was written.
absl::Status EncodeInt8(TypedSpan source, const ErrorFeedback* feedback, absl::Span<uint8_t> wire);

// Decodes values.size() elements to bf16. Status: InvalidArgument if counts differ, or a scale has
// its sign bit set (names the block, counted from `wire`); then nothing was written.
absl::Status DecodeInt8(absl::Span<const uint8_t> wire, absl::Span<uint16_t> values);

}  // namespace orlop::kernels
