// Says in which dtypes a slot can be read and set, and which stored slots its values are made of.
// Pure functions; any thread.
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
  // Elements are as they are stored.
  kCopy,
  // A parameter's weight in fp32 or fp16 is joined from bf16 weight and remainder, or split.
  kMaster,
  // A state in fp32 is decoded from codes and the absmax of each block, or encoded.
  kBlocks,
};

struct SlotMapping {
  Conversion conversion = Conversion::kCopy;
  // The stored slot that has the values.
  Slot first = Slot::kWeight;
  // kMaster: the remainder, if the tensor has one. kBlocks: the absmax of the codes.
  std::optional<Slot> second;

  // Whether reading or setting the values reads or sets this stored slot.
  bool uses(Slot slot) const { return first == slot || second == slot; }
};

// Returns how values of `dtype` map to the stored bytes of `slot`. A parameter's weight can have
// its stored dtype, F32 or F16; the master F32; codes U8 or F32; every other slot its stored dtype.
// `verb` is "read" or "set", for the message.
//   Status  InvalidArgument (the shard has no such slot, or the slot cannot have this dtype)
absl::StatusOr<SlotMapping> MapSlot(const ShardInfo& shard, const SlotFormats& formats, Slot slot,
                                    v1::DType dtype, absl::string_view verb);

}  // namespace orlop::server
