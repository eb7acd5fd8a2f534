// Parts of tensors from Python: tuples (tensor index, slot, dtype name, (flat offset, count) or
// None, array, applied count or None). Arrays are C-contiguous host memory of any library that
// speaks DLPack; they are held, not copied.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <vector>

#include "client/link/parts.h"

namespace orlop::python {

using Array = nanobind::ndarray<nanobind::c_contig, nanobind::device::cpu>;

// Keeps the arrays alive while their bytes are on the way. Destroy with the GIL held.
template <typename Part>
struct HeldParts {
  std::vector<Part> parts;
  std::vector<Array> arrays;
};

// Raise TypeError (not such a tuple or array) or ValueError (unknown dtype name).
HeldParts<client::PushPart> PushPartsOf(nanobind::list tuples);
HeldParts<client::PullPart> PullPartsOf(nanobind::list tuples);

}  // namespace orlop::python
