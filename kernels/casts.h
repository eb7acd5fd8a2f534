// Conversions between element types, and the exact fp32 master as (bf16 weight, int16 remainder).
// bf16 and fp16 values are held as their bit patterns in uint16_t.
//
//   Master    bits32 = (weight << 16) + remainder, modulo 2^32. The weight is the master rounded
//             half up in magnitude, so the remainder always fits: -32768..32767.
//   Versus    master.bfloat16(): equal, except on exact ties, which go away from zero.
//   Overflow  a finite master of magnitude 0x7F7F8000 (3.3961776e38) or more has the weight
//             +-infinity, as it has in bfloat16(); its remainder is negative and the join exact.
//   NaN       every NaN splits to (0x7FC0, 0). Infinities split to (+-infinity, 0). All other
//             values, zeros and subnormals included, come back bit for bit.
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

// destination[i] = source[i] rounded to nearest, ties to even; beyond the range: infinity.
absl::Status RoundToBF16(absl::Span<const float> source, absl::Span<uint16_t> destination);
absl::Status RoundToF16(absl::Span<const float> source, absl::Span<uint16_t> destination);

// Splits the exact master into what is stored. Used by LOAD steps; the optimizers do it themselves.
absl::Status SplitMaster(absl::Span<const float> master, absl::Span<uint16_t> weight,
                         absl::Span<int16_t> remainder);

// What a LOAD stores of other masters (optimizer.h, MasterFormat): the nearest, ties away from
// zero.
//   24 bit   bits32 = (weight << 16) + (remainder << 8)
//   bf16     the weight that SplitMaster gives
absl::Status SplitMaster24(absl::Span<const float> master, absl::Span<uint16_t> weight,
                           absl::Span<int8_t> remainder);
absl::Status RoundToBF16Away(absl::Span<const float> master, absl::Span<uint16_t> weight);

// The exact master, for fp32 workers and exports. A bf16 worker is served the weight plane itself.
absl::Status JoinMaster(absl::Span<const uint16_t> weight, absl::Span<const int16_t> remainder,
                        absl::Span<float> master);

// What fp16 could not hold: masters of magnitude above 65504, infinities included, NaN not.
struct F16Overflow {
  uint64_t count = 0;
  uint64_t first_index = 0;  // valid when count > 0
};

// The fp16 weight, rounded once from the exact master (nearest, ties to even), for fp16 workers.
// Writes all elements; *overflow says what the caller must refuse by tensor name.
absl::Status JoinMasterToF16(absl::Span<const uint16_t> weight, absl::Span<const int16_t> remainder,
                             absl::Span<uint16_t> destination, F16Overflow* overflow);

}  // namespace orlop::kernels
