// Which stored elements of one slot the pieces of a LOAD set, and what the others become: a piece
// that sets a weight as bf16 makes its remainder zero, unless another one sets that; everything
// else keeps its bits. Not thread-safe.
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
  LoadCover(const ShardInfo& shard, const SlotFormats& formats, Slot covered);

  // Adds a piece, of any slot of the shard. Status as MapSlot.
  absl::Status Add(Slot slot, v1::DType dtype, const Box& box);

  bool is_whole() const;  // every element is set
  // The slot keeps its bytes. `has_contents`: it was written before; otherwise it is zero already.
  bool is_untouched(bool has_contents) const;
  const SlotFormat& format() const { return formats_[SlotIndex(slot_)]; }
  // Writes the elements that are not set to `out`: those of `base`, initial ones if it is null, or
  // zero.
  void FillRest(const Buffer* base, Buffer* out) const;

 private:
  void Mark(const Box& box, std::vector<bool>* elements) const;

  const ShardInfo shard_;
  const SlotFormats formats_;
  const Slot slot_;
  std::vector<bool> set_, zeroed_;  // by stored element; empty: none
};

}  // namespace orlop::server
