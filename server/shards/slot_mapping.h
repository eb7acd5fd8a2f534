// In which dtypes a slot can be read and set, and which stored slots that concerns. Pure; any
// thread.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "orlop/v1/types.pb.h"
#include "server/job/slots.h"
#include "server/shards/shard_info.h"

namespace orlop::server {

enum class Conversion : uint8_t {
  kCopy,    // elements as they are stored
  kMaster,  // a parameter's weight in fp32 or fp16: bf16 weight and remainder, joined or split
  kBlocks,  // a state in fp32: codes and the absmax of each block, decoded or encoded
};

struct SlotMapping {
  Conversion conversion = Conversion::kCopy;
  Slot first = Slot::kWeight;  // stored
  std::optional<Slot> second;  // the remainder, if the tensor has one; the absmax of codes

  bool uses(Slot slot) const { return first == slot || second == slot; }
};

// How values of `dtype` map to the stored bytes of `slot`: weight in its stored dtype, F32 or F16;
// master in F32; codes in U8 or F32; all else as stored. `verb` is "read" or "set", for the
// message.
//   Status  InvalidArgument: the shard has no such slot, or it cannot be in this dtype
absl::StatusOr<SlotMapping> MapSlot(const ShardInfo& shard, const SlotFormats& formats, Slot slot,
                                    v1::DType dtype, absl::string_view verb);

}  // namespace orlop::server
