// Parts of tensors from Python, as tuples of six:
//   tensor index, slot, dtype name, box, array, applied count or None
// A box is one of
//   (offset, count)                        a range of the flattened tensor
//   ((offset, ...), (extent, ...))         one offset and one extent for each dimension
//   None                                   the whole tensor
// An array is C-contiguous host memory of any library that speaks DLPack. It is held, not copied.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <vector>

#include "client/session.h"

namespace orlop::python {

using Array = nanobind::ndarray<nanobind::c_contig, nanobind::device::cpu>;

// Parts, and the arrays that own their bytes. The GIL must be held when it is destroyed.
template <typename Part>
struct HeldParts {
  std::vector<Part> parts;
  std::vector<Array> arrays;
};

// Both raise TypeError if an item is no such tuple or array, or an array has bytes and no memory,
// and ValueError for an unknown dtype.
// The GIL must be held.
HeldParts<client::PushPart> PushPartsOf(const nanobind::list& tuples);
HeldParts<client::PullPart> PullPartsOf(const nanobind::list& tuples);

}  // namespace orlop::python
