// Boxes of tensors: plain geometry without protobuf, shared by clients, servers and the step
// machine.
//
// A tensor of shape [d0, d1, ...] is flattened row-major. A shard is a flat range. The elements of
// a box inside a shard, in ascending flat order, are one contiguous range of the box's own
// row-major buffer: [first, first + count) below.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace orlop {

inline constexpr size_t kMaxDimensions = 8;  // of a tensor
inline constexpr uint64_t kMaxTensorElements = uint64_t{1} << 46;

// Offset and extent per dimension, in elements; `flat`: one range of the flattened tensor.
struct Box {
  std::vector<uint64_t> offset;
  std::vector<uint64_t> extent;
  bool flat = false;

  friend bool operator==(const Box&, const Box&) = default;
  friend auto operator<=>(const Box&, const Box&) = default;
};

// A range of elements [begin, end).
struct Range {
  uint64_t begin = 0;
  uint64_t end = 0;

  uint64_t count() const { return end - begin; }
  bool empty() const { return end <= begin; }
  friend bool operator==(const Range&, const Range&) = default;
  friend auto operator<=>(const Range&, const Range&) = default;
};

inline std::string ToString(const Box& box) {
  return absl::StrCat(box.flat ? "flat" : "", "[", absl::StrJoin(box.offset, ","), "]+[",
                      absl::StrJoin(box.extent, ","), "]");
}

// Elements of a shape; InvalidArgument on more than 8 dimensions, a zero dimension, or over
// kMaxTensorElements.
inline absl::StatusOr<uint64_t> ElementCount(const std::vector<uint64_t>& shape) {
  if (shape.size() > kMaxDimensions)
    return absl::InvalidArgumentError(
        absl::StrCat("shape has ", shape.size(), " dimensions; the limit is ", kMaxDimensions));
  uint64_t count = 1;
  for (uint64_t dimension : shape) {
    if (dimension == 0)
      return absl::InvalidArgumentError(
          absl::StrCat("shape [", absl::StrJoin(shape, ","), "] has a dimension of 0"));
    if (dimension > kMaxTensorElements / count)
      return absl::InvalidArgumentError(absl::StrCat("shape [", absl::StrJoin(shape, ","),
                                                     "] has more than ", kMaxTensorElements,
                                                     " elements"));
    count *= dimension;
  }
  return count;
}

inline uint64_t ShardCount(uint64_t element_count, uint64_t shard_elements) {
  return (element_count + shard_elements - 1) / shard_elements;
}
inline Range ShardRange(uint64_t shard, uint64_t element_count, uint64_t shard_elements) {
  return {shard * shard_elements, std::min((shard + 1) * shard_elements, element_count)};
}

inline Box WholeTensor(uint64_t element_count) { return {{0}, {element_count}, true}; }

// A box in its simplest equal form: flat where the elements are one flat range, otherwise as given.
// Two boxes with the same elements in the same order that are both simplified compare equal if
// either is flat. Requires a valid box.
inline Box Simplified(const Box& box, const std::vector<uint64_t>& shape) {
  if (box.flat) return box;
  uint64_t stride = 1, offset = 0, count = 1;
  bool inner_whole = true;  // all faster dimensions are taken whole
  for (size_t i = shape.size(); i-- > 0;) {
    if (!inner_whole && box.extent[i] != 1) return box;
    offset += box.offset[i] * stride;
    count *= box.extent[i];
    if (box.extent[i] != shape[i]) inner_whole = false;
    stride *= shape[i];
  }
  return {{offset}, {count}, true};
}

// InvalidArgument, naming dimension, value and limit, unless the box lies inside a tensor of this
// shape.
inline absl::Status ValidateBox(const Box& box, const std::vector<uint64_t>& shape,
                                uint64_t element_count) {
  const std::vector<uint64_t> flat_shape = {element_count};
  const std::vector<uint64_t>& bounds = box.flat ? flat_shape : shape;
  if (box.offset.size() != bounds.size() || box.extent.size() != bounds.size())
    return absl::InvalidArgumentError(
        absl::StrCat("box ", ToString(box), " has ", box.offset.size(), " offsets and ",
                     box.extent.size(), " extents; expected ", bounds.size(), " of each"));
  for (size_t i = 0; i < bounds.size(); ++i) {
    if (box.extent[i] == 0)
      return absl::InvalidArgumentError(
          absl::StrCat("box ", ToString(box), " has extent 0 in dimension ", i));
    if (box.offset[i] > bounds[i] || box.extent[i] > bounds[i] - box.offset[i])  // cannot overflow
      return absl::InvalidArgumentError(absl::StrCat(
          "box ", ToString(box), " ends beyond dimension ", i, " of size ", bounds[i]));
  }
  return absl::OkStatus();
}

inline uint64_t BoxElementCount(const Box& box) {
  uint64_t count = 1;
  for (uint64_t extent : box.extent) count *= extent;
  return count;
}

// Number of elements of a valid box whose flat index is below `end`: where a shard boundary falls
// in the box's buffer.
inline uint64_t BoxElementsBelow(const Box& box, const std::vector<uint64_t>& shape, uint64_t end) {
  if (box.flat) return std::min(std::max(end, box.offset[0]) - box.offset[0], box.extent[0]);
  uint64_t stride = 1,
           inner =
               1;  // elements of the tensor, of the box, under one index of the dimension before
  for (uint64_t dimension : shape) stride *= dimension;
  inner = BoxElementCount(box);
  if (end >= stride) return inner;
  uint64_t below = 0;
  for (size_t i = 0; i < shape.size(); ++i) {
    stride /= shape[i];
    inner /= box.extent[i];
    const uint64_t index = end / stride;
    end %= stride;
    if (index < box.offset[i]) return below;
    if (index >= box.offset[i] + box.extent[i]) return below + box.extent[i] * inner;
    below += (index - box.offset[i]) * inner;
  }
  return below;
}

// The part of a valid box inside a flat range, as a range of the box's row-major buffer. Empty if
// they do not meet.
inline Range BoxPart(const Box& box, const std::vector<uint64_t>& shape, Range flat) {
  return {BoxElementsBelow(box, shape, flat.begin), BoxElementsBelow(box, shape, flat.end)};
}

// Calls visit(Range flat) for every contiguous flat run of (box within `flat`), ascending. Runs are
// maximal within rows.
template <typename Visit>
void ForEachRun(const Box& box, const std::vector<uint64_t>& shape, Range flat, Visit visit) {
  const Box simple = Simplified(box, shape);
  if (simple.flat) {
    const Range run = {std::max(flat.begin, simple.offset[0]),
                       std::min(flat.end, simple.offset[0] + simple.extent[0])};
    if (!run.empty()) visit(run);
    return;
  }
  // A row: the fastest dimensions taken whole, and one range of the dimension before them.
  size_t last = shape.size() - 1;
  uint64_t row = box.extent[last], row_stride = 1;
  while (last > 0 && box.extent[last] == shape[last]) {
    row_stride *= shape[last];
    --last;
    row = box.extent[last] * row_stride;
  }
  std::vector<uint64_t> stride(shape.size(), 1);
  for (size_t i = shape.size() - 1; i-- > 0;) stride[i] = stride[i + 1] * shape[i + 1];
  uint64_t row_count = 1;
  for (size_t i = 0; i < last; ++i) row_count *= box.extent[i];
  const Range part = BoxPart(box, shape, flat);
  if (part.empty()) return;
  for (uint64_t r = part.begin / row; r < row_count && r * row < part.end; ++r) {
    uint64_t rest = r, begin = box.offset[last] * stride[last];
    for (size_t i = last; i-- > 0;) {
      begin += (box.offset[i] + rest % box.extent[i]) * stride[i];
      rest /= box.extent[i];
    }
    const Range run = {std::max(begin, flat.begin), std::min(begin + row, flat.end)};
    if (!run.empty()) visit(run);
  }
}

}  // namespace orlop
