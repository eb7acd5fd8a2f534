// Turns the values of a SetState piece into stored bytes: copies them, splits weights into bf16 and
// remainder, or encodes states in blocks.
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
  // New contents of one stored slot of the shard.
  struct Plane {
    BufferPtr data;  // null: the piece has no second slot
    SlotFormat format;
  };
  LoadConverter(const ShardInfo& shard, const LoadPlan& plan, kernels::Rounding rounding,
                Plane first, Plane second);

  // Takes the next bytes of the piece, whole elements.
  //   Status  InvalidArgument (fp32 contents of codes that are not whole blocks; a value that the
  //           format cannot hold)
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
  bool started_ = false;
  uint64_t base_ = 0;          // first block of a flat box of blocks
  std::vector<float> values_;  // widened
};

}  // namespace orlop::server
