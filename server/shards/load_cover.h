// Finds out which stored elements of one slot the pieces of a LOAD set, and gives the others their
// contents. A piece that sets a weight as bf16 makes its remainder zero, unless another piece sets
// the remainder. Every other element keeps its bits. Not thread-safe.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "base/box.h"
#include "orlop/v1/types.pb.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/shard_info.h"

namespace orlop::server {

class LoadCover {
 public:
  // `covered` is the slot in question; `formats` are those of the shard.
  LoadCover(const ShardInfo& shard, const SlotFormats& formats, Slot covered);

  // Adds a piece of any slot of the shard. Status as MapSlot (slot_mapping.h).
  absl::Status Add(Slot slot, v1::DType dtype, const Box& box);

  // Returns whether the pieces set every element.
  bool is_whole() const;
  // Returns whether the slot keeps its bytes. `has_contents` says whether it was ever written; if
  // it was not, a remainder is zero already.
  bool is_untouched(bool has_contents) const;
  const SlotFormat& format() const { return formats_[SlotIndex(slot_)]; }
  // Writes to `out` the elements that no piece sets. They are zero (a remainder, see above), those
  // of `base`, or initial ones if `base` is null. Both buffers have the slot's stored elements.
  void FillRest(const Buffer* base, Buffer* out) const;

 private:
  void Mark(const Box& box, std::vector<bool>* elements) const;

  const ShardInfo shard_;
  const SlotFormats formats_;
  const Slot slot_;
  // By stored element: whether a piece sets it, or makes it zero. Empty: no element.
  std::vector<bool> set_, zeroed_;
};

}  // namespace orlop::server
