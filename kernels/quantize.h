// 8-bit block quantisation on the dynamic map.
//   Source    Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022; the table of
//             bitsandbytes' create_dynamic_map.
//   Block     256 consecutive elements (the last block: what is left) share absmax, their largest
//             magnitude, fp32.
//   Decode    value = code_book[code] * absmax, one fp32 product. absmax must be finite and >= 0.
//   Encode    code of the code-book value nearest to r = x / absmax (one IEEE fp32 division),
//             measured exactly; an exact tie goes to the even code. A block of zeros has absmax 0
//             and the code of 0 everywhere.
//   Special   an infinity saturates to +-FLT_MAX; a NaN gets the code of 0 and does not touch
//             absmax, so one bad element leaves its neighbours alone. Unsigned: a negative x is
//             coded as 0.
//   Threads   no shared state; disjoint ranges of whole blocks may run at once. No overlap.
//   Status    InvalidArgument if counts differ; then nothing was written.
#pragma once
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/code_books.h"
#include "kernels/types.h"

namespace orlop::kernels {

enum class CodeBook : uint8_t {
  kSigned,    // kSignedCodeBook: exp_avg, momentum_buffer
  kUnsigned,  // kUnsignedCodeBook: exp_avg_sq
};

enum class Rounding : uint8_t {
  // A positive x is never coded as 0: below the middle of 0 and code 1 it gets code 1. The default
  // for exp_avg_sq: losing sqrt(v) of a small element divides its update by almost nothing.
  kNoZero,
  kNearest,  // Plain nearest: the codes of bitsandbytes but for exact ties and the sign of tiny m.
};

// codes: [count]; absmax: [BlockCount(count)]. The signed code book is always rounded to nearest.
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

}  // namespace orlop::kernels
