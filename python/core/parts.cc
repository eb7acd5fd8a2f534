#include "python/core/parts.h"

#include <nanobind/stl/string.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "client/session.h"
#include "orlop/v1/types.pb.h"

namespace orlop::python {
namespace nb = nanobind;

namespace {

v1::DType DTypeOf(nb::handle name) {
  v1::DType dtype;
  const auto text = "DTYPE_" + nb::cast<std::string>(name);
  if (!v1::DType_Parse(text, &dtype)) throw nb::value_error(("unknown dtype " + text).c_str());
  return dtype;
}

std::optional<Box> BoxOf(nb::handle range) {
  if (range.is_none()) return std::nullopt;
  auto pair = nb::cast<nb::tuple>(range);
  if (pair.size() != 2) throw nb::type_error("a box is a tuple of 2: offset and extent");
  if (nb::isinstance<nb::tuple>(pair[0])) {
    Box box;
    for (nb::handle offset : pair[0]) box.offset.push_back(nb::cast<uint64_t>(offset));
    for (nb::handle extent : pair[1]) box.extent.push_back(nb::cast<uint64_t>(extent));
    return box;
  }
  return Box{.offset = {nb::cast<uint64_t>(pair[0])},
             .extent = {nb::cast<uint64_t>(pair[1])},
             .flat = true};
}

// What PushPart and PullPart share. The array's bytes are the part's data.
template <typename Part, typename Byte>
void Add(const nb::tuple& fields, HeldParts<Part>* held) {
  if (fields.size() != 6) throw nb::type_error("a part is a tuple of 6");
  auto array = nb::cast<Array>(fields[4]);
  Part part;
  part.tensor = nb::cast<uint32_t>(fields[0]);
  part.slot = nb::cast<std::string>(fields[1]);
  part.dtype = DTypeOf(fields[2]);
  part.box = BoxOf(fields[3]);
  // The storage of a wrapper subclass, FakeTensor or meta tensor has bytes and no memory.
  if (array.data() == nullptr && array.nbytes() > 0) {
    const auto text = absl::StrCat("the array of tensor ", part.tensor, " has ", array.nbytes(),
                                   " bytes and no memory: its data pointer is null");
    throw nb::type_error(text.c_str());
  }
  part.data = absl::Span<Byte>(static_cast<Byte*>(array.data()), array.nbytes());
  held->parts.push_back(std::move(part));
  held->arrays.push_back(std::move(array));
}

}  // namespace

HeldParts<client::PushPart> PushPartsOf(const nb::list& tuples) {
  HeldParts<client::PushPart> held;
  for (nb::handle item : tuples) {
    auto fields = nb::cast<nb::tuple>(item);
    Add<client::PushPart, const std::byte>(fields, &held);
    if (!fields[5].is_none()) held.parts.back().applied_count = nb::cast<uint64_t>(fields[5]);
  }
  return held;
}

HeldParts<client::PullPart> PullPartsOf(const nb::list& tuples) {
  HeldParts<client::PullPart> held;
  for (nb::handle item : tuples) Add<client::PullPart, std::byte>(nb::cast<nb::tuple>(item), &held);
  return held;
}

}  // namespace orlop::python
