// Plain structs of base/ as messages of the protocol, and back.
#pragma once

#include "base/box.h"
#include "base/checksum.h"
#include "orlop/v1/types.pb.h"

namespace orlop {

inline void ToWire(const Box& box, v1::Box* out) {
  out->mutable_offset()->Assign(box.offset.begin(), box.offset.end());
  out->mutable_extent()->Assign(box.extent.begin(), box.extent.end());
  out->set_flat(box.flat);
}
inline Box FromWire(const v1::Box& box) {
  return {{box.offset().begin(), box.offset().end()},
          {box.extent().begin(), box.extent().end()},
          box.flat()};
}

inline void ToWire(const Digest128& digest, v1::Digest* out) {
  out->set_high(digest.high);
  out->set_low(digest.low);
}
inline Digest128 FromWire(const v1::Digest& digest) { return {digest.high(), digest.low()}; }

}  // namespace orlop
