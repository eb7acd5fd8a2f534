#include "base/box.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace orlop {

std::string ToString(const Box& box) {
  return absl::StrCat(box.flat ? "flat" : "", "[", absl::StrJoin(box.offset, ","), "]+[",
                      absl::StrJoin(box.extent, ","), "]");
}

absl::StatusOr<uint64_t> ElementCount(const Shape& shape) {
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

uint64_t BoxElementCount(const Box& box) {
  uint64_t count = 1;
  for (uint64_t extent : box.extent) count *= extent;
  return count;
}

uint64_t ShardCount(uint64_t element_count, uint64_t shard_elements) {
  return (element_count + shard_elements - 1) / shard_elements;
}

Range ShardRange(uint64_t shard, uint64_t element_count, uint64_t shard_elements) {
  return {shard * shard_elements, std::min((shard + 1) * shard_elements, element_count)};
}

Box FlatBox(uint64_t begin, uint64_t count) { return {{begin}, {count}, true}; }
Box WholeTensor(uint64_t element_count) { return FlatBox(0, element_count); }

Box Simplified(const Box& box, const Shape& shape) {
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
  return FlatBox(offset, count);
}

absl::Status ValidateBox(const Box& box, const Shape& shape, uint64_t element_count) {
  const Shape flat_shape = {element_count};
  const Shape& bounds = box.flat ? flat_shape : shape;
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
          "box ", ToString(box), " reaches outside dimension ", i, " of size ", bounds[i]));
  }
  return absl::OkStatus();
}

uint64_t BoxElementsBelow(const Box& box, const Shape& shape, uint64_t end) {
  if (box.flat) return std::min(std::max(end, box.offset[0]) - box.offset[0], box.extent[0]);
  // Elements of the tensor, and of the box, under one index of the dimension before.
  uint64_t stride = 1, inner = BoxElementCount(box);
  for (uint64_t dimension : shape) stride *= dimension;
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

Range BoxPart(const Box& box, const Shape& shape, Range flat) {
  return {BoxElementsBelow(box, shape, flat.begin), BoxElementsBelow(box, shape, flat.end)};
}

RunIterator::RunIterator(const Box& box, const Shape& shape, Range flat) : flat_(flat) {
  if (box.flat) {
    base_ = box.offset[0];
    row_length_ = box.extent[0];
  } else {
    // Trailing dimensions that the box spans whole merge into one row.
    size_t d = shape.size();
    uint64_t stride = 1;
    while (d > 0) {
      --d;
      base_ += box.offset[d] * stride;
      row_length_ *= box.extent[d];
      stride *= shape[d];
      if (box.extent[d] != shape[d]) break;
    }
    outer_ = d;
    for (size_t outer = outer_; outer-- > 0;) {
      extent_[outer] = box.extent[outer];
      stride_[outer] = stride;
      base_ += box.offset[outer] * stride;
      row_count_ *= box.extent[outer];
      stride *= shape[outer];
    }
  }
  uint64_t low = 0, high = row_count_;  // finds the first row that ends after `flat` begins
  while (low < high) {
    const uint64_t middle = low + (high - low) / 2;
    if (RowBegin(middle) + row_length_ > flat_.begin) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  row_ = low;
}

uint64_t RunIterator::RowBegin(uint64_t row) const {
  uint64_t at = base_;
  for (size_t d = outer_; d-- > 0;) {
    at += (row % extent_[d]) * stride_[d];
    row /= extent_[d];
  }
  return at;
}

bool RunIterator::Next(Run* run) {
  if (row_ >= row_count_) return false;
  const uint64_t row_begin = RowBegin(row_);
  const uint64_t from = std::max(flat_.begin, row_begin);
  const uint64_t to = std::min(flat_.end, row_begin + row_length_);
  if (from >= to) return false;
  *run = {from, row_ * row_length_ + (from - row_begin), to - from};
  ++row_;
  return true;
}

}  // namespace orlop
