// Boxes of tensors: plain geometry without protobuf, shared by clients, servers and the step
// machine.
//
// A tensor of shape [d0, d1, ...] is flattened row-major. A shard is a range of flat indices. The
// elements of a box inside a shard, in ascending flat order, are one contiguous range of the box's
// own row-major buffer, which BoxPart computes.
//
// Units    all offsets, extents and counts are elements.
// Threads  pure functions and values: safe from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace orlop {

inline constexpr size_t kMaxDimensions = 8;  // of a tensor
inline constexpr uint64_t kMaxTensorElements = uint64_t{1} << 46;

using Shape = std::vector<uint64_t>;  // empty: a scalar, which has one element

// An N-d rectangle with one offset and extent per dimension. If `flat`, it is one range of the
// flattened tensor instead, with exactly one offset and extent.
struct Box {
  std::vector<uint64_t> offset;
  std::vector<uint64_t> extent;
  bool flat = false;

  friend bool operator==(const Box&, const Box&) = default;
  friend auto operator<=>(const Box&, const Box&) = default;
};

// The elements [begin, end).
struct Range {
  uint64_t begin = 0;
  uint64_t end = 0;

  uint64_t count() const { return end - begin; }
  bool empty() const { return end <= begin; }
  friend bool operator==(const Range&, const Range&) = default;
  friend auto operator<=>(const Range&, const Range&) = default;
};

// "[0,2]+[4,3]" is a box at offset (0, 2) of extent (4, 3); "flat[11]+[13]" is a flat one.
std::string ToString(const Box& box);

// The number of elements of a shape.
//   Status  InvalidArgument: more than kMaxDimensions dimensions, a dimension of 0, or more than
//           kMaxTensorElements elements.
absl::StatusOr<uint64_t> ElementCount(const Shape& shape);
// The number of elements of a valid box.
uint64_t BoxElementCount(const Box& box);

uint64_t ShardCount(uint64_t element_count, uint64_t shard_elements);
// The flat range of shard number `shard`; every shard but the last has `shard_elements` elements.
Range ShardRange(uint64_t shard, uint64_t element_count, uint64_t shard_elements);

Box FlatBox(uint64_t begin, uint64_t count);
Box WholeTensor(uint64_t element_count);

// The same elements as a flat box if they are one flat range, otherwise the box as given. Two
// simplified boxes that have the same elements in the same order compare equal if either is flat.
// The box must be valid.
Box Simplified(const Box& box, const Shape& shape);

// Checks that a box lies inside a tensor of this shape, whose element count is `element_count`.
//   Status  InvalidArgument, naming box, dimension, value and limit.
absl::Status ValidateBox(const Box& box, const Shape& shape, uint64_t element_count);

// The number of elements of a valid box whose flat index is below `end`.
uint64_t BoxElementsBelow(const Box& box, const Shape& shape, uint64_t end);
// The part of a valid box inside the flat range `flat`, as a range of the box's row-major buffer.
// It is empty if they do not meet.
Range BoxPart(const Box& box, const Shape& shape, Range flat);

// A contiguous stretch of a box: elements [tensor_begin, tensor_begin + count) of the flattened
// tensor are elements [box_begin, box_begin + count) of the box's row-major buffer.
struct Run {
  uint64_t tensor_begin = 0;
  uint64_t box_begin = 0;
  uint64_t count = 0;

  Range in_tensor() const { return {tensor_begin, tensor_begin + count}; }
};

// Walks the runs of a valid box inside the flat range `flat`, ascending. Trailing dimensions that
// the box spans whole are merged into one run.
//   Cost     O(dimensions) per run; rows outside of `flat` cost nothing. It allocates nothing.
class RunIterator {
 public:
  RunIterator(const Box& box, const Shape& shape, Range flat);
  bool Next(Run* run);  // false: there is no further run

 private:
  uint64_t RowBegin(uint64_t row) const;  // flat index of the row's first element

  size_t outer_ = 0;                      // dimensions that are stepped through
  uint64_t extent_[kMaxDimensions] = {};  // of the stepped dimensions
  uint64_t stride_[kMaxDimensions] = {};
  uint64_t base_ = 0;  // flat index of the box's first element
  uint64_t row_length_ = 1;
  uint64_t row_count_ = 1;
  uint64_t row_ = 0;  // the next one
  Range flat_;
};

// Calls visit(Range) with the flat range of every run that RunIterator finds.
template <typename Visit>
void ForEachRun(const Box& box, const Shape& shape, Range flat, Visit visit) {
  RunIterator runs(box, shape, flat);
  for (Run run; runs.Next(&run);) visit(run.in_tensor());
}

}  // namespace orlop
