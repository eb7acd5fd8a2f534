// Conversions between element types, and the exact fp32 master as (bf16 weight, int16 remainder).
// bf16 and fp16 values are stored as their bit patterns in uint16_t.
//
//   Master    bits32 = (weight << 16) + remainder, modulo 2^32. The weight is the master rounded
//             half up in magnitude, so the remainder always fits: -32768..32767.
//   Versus    master.bfloat16() is equal, except that here exact ties are rounded away from zero.
//   Overflow  The weight of a finite master of magnitude 0x7F7F8000 (3.3961776e38) or more is
//             +-infinity, as in bfloat16(); its remainder is negative, and the join is exact.
//   NaN       Every NaN splits to (0x7FC0, 0), an infinity to (+-infinity, 0). All other values,
//             zeros and subnormals included, are restored bit for bit.
//   Threads   no shared state; disjoint ranges may run at once. Spans must not overlap.
//   Status    InvalidArgument if counts differ; then nothing was written.
#pragma once
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/types.h"

namespace orlop::kernels {

// Largest finite fp16.
inline constexpr float kLargestF16 = 65504.0f;

// destination[i] = source[i] as fp32, exactly. A bf16 NaN keeps its bits (a shift); an fp16 NaN
// becomes 0x7FC00000; an fp32 source is copied.
absl::Status WidenToF32(TypedSpan source, absl::Span<float> destination);

// destination[i] = source[i] rounded to nearest, ties to even; values beyond the range become
// infinity.
absl::Status RoundToBF16(absl::Span<const float> source, absl::Span<uint16_t> destination);
absl::Status RoundToF16(absl::Span<const float> source, absl::Span<uint16_t> destination);

// Splits the exact master into weight and remainder. LOAD steps use this; optimizer steps split by
// themselves.
absl::Status SplitMaster(absl::Span<const float> master, absl::Span<uint16_t> weight,
                         absl::Span<int16_t> remainder);

// The same for the other master formats (optimizer.h, MasterFormat), rounded to nearest, ties away
// from zero.
//   24 bit   bits32 = (weight << 16) + (remainder << 8)
//   bf16     the weight that SplitMaster gives
absl::Status SplitMaster24(absl::Span<const float> master, absl::Span<uint16_t> weight,
                           absl::Span<int8_t> remainder);
absl::Status RoundToBF16Away(absl::Span<const float> master, absl::Span<uint16_t> weight);

// Joins the exact master, for fp32 workers and exports. A bf16 worker receives the stored weights.
absl::Status JoinMaster(absl::Span<const uint16_t> weight, absl::Span<const int16_t> remainder,
                        absl::Span<float> master);

// The masters that fp16 cannot represent: magnitudes above 65504, infinities included, NaN
// excluded.
struct F16Overflow {
  uint64_t count = 0;
  // Valid if count > 0.
  uint64_t first_index = 0;
};

// Rounds the fp16 weight, once, from the exact master (nearest, ties to even), for fp16 workers.
// Writes all elements; if overflow->count > 0 the caller must refuse the pull and name the tensor.
absl::Status JoinMasterToF16(absl::Span<const uint16_t> weight, absl::Span<const int16_t> remainder,
                             absl::Span<uint16_t> destination, F16Overflow* overflow);

}  // namespace orlop::kernels
