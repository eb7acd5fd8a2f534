// Converts the values of a SetState piece to stored bytes: it copies them, splits masters into bf16
// weights and remainders, or encodes states to codes and absmax.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/quantize.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/load_plan.h"
#include "server/shards/run_cursor.h"
#include "server/shards/shard_info.h"

namespace orlop::server {

// Not thread-safe: one stream owns it.
class LoadConverter {
 public:
  // The new contents of one stored slot of the shard, which pieces write.
  struct Plane {
    // Null if the piece has no second slot.
    BufferPtr data;
    SlotFormat format;
  };
  // `first` and `second` are the planes of plan.mapping.first and second. `rounding` is for
  // encoding.
  LoadConverter(const ShardInfo& shard, const LoadPlan& plan, kernels::Rounding rounding,
                Plane first, Plane second);

  // Converts the next bytes of the piece, which must be whole elements. `offset_bytes` is their
  // offset in the piece.
  //   Status  InvalidArgument (fp32 values of codes do not cover whole blocks, or the format cannot
  //           hold a value), Internal (the piece has more elements than its box)
  absl::Status Write(uint64_t offset_bytes, absl::Span<const uint8_t> bytes);

 private:
  absl::Status CopyBlocks(uint64_t offset_bytes, absl::Span<const uint8_t> bytes);
  absl::Status Convert(uint64_t local, uint64_t count, absl::Span<const uint8_t> bytes);
  void Copy(uint64_t local, uint64_t count, absl::Span<const uint8_t> bytes);
  absl::Status Split(uint64_t local, uint64_t count);
  absl::Status Encode(uint64_t local, uint64_t count);
  absl::Status Widen(absl::Span<const uint8_t> bytes, uint64_t count);

  const ShardInfo shard_;
  const LoadPlan plan_;
  const kernels::Rounding rounding_;
  Plane first_, second_;
  RunCursor cursor_;
  // base_ is set.
  bool started_ = false;
  // Index of the first stored element of the box, for CopyBlocks.
  uint64_t base_ = 0;
  // The values in hand, widened to fp32.
  std::vector<float> values_;
};

}  // namespace orlop::server
