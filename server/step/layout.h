// Boxes of tensors, and who contributes which part of which gradient: contribution layouts.
//
// A layout is registered with a generation and checked whole before any push, so that a server
// knows which pieces make a shard complete. Pure functions; safe from any thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/step/identity.h"

namespace orlop::step {

using TensorId = int32_t;  // index in the manifest
using ShardId = int32_t;   // index in manifest order: by tensor, then by begin
using Rank = int32_t;      // contributor, 0 .. world size - 1

inline constexpr int kMaxDimensions = 8;

using Shape = std::vector<int64_t>;

// An N-d rectangle. `offset` and `extent` have one entry per dimension of the tensor; or exactly
// one entry, then they are a flat range of the row-major flattened tensor (for a 1-D tensor both
// mean the same). A scalar tensor (shape {}) is spoken of as a flat range of one element.
struct Box {
  std::vector<int64_t> offset;
  std::vector<int64_t> extent;
  friend bool operator==(const Box&, const Box&) = default;
};

Box FlatBox(int64_t begin, int64_t count);

// Product of the dimensions. InvalidArgument: over 8 dimensions, a negative one, or beyond 2^63-1.
absl::StatusOr<int64_t> ElementCount(const Shape& shape);

// InvalidArgument unless the box has the tensor's dimensions (or one: flat), no negative offset,
// extents of at least 1, and lies within the shape. Sums are checked for overflow.
absl::Status CheckBox(const std::string& tensor, const Shape& shape, const Box& box);

// The number of elements of a box that passed CheckBox.
int64_t ElementCount(const Box& box);

// The elements of a box whose row-major flat index lies in [begin, begin + count), ascending: a
// contiguous part of the box's own row-major order, so a piece's payload is one slice of its box's.
struct Piece {
  int64_t box_begin = 0;  // first element, counted in the box's row-major order
  int64_t count = 0;      // elements; 0: the box does not touch the range
};
Piece Intersect(const Shape& shape, const Box& box, int64_t begin, int64_t count);

// A contiguous stretch of a box: `count` elements at flat index `tensor_begin` of the tensor and at
// `box_begin` of the box's row-major order.
struct Run {
  int64_t tensor_begin = 0;
  int64_t box_begin = 0;
  int64_t count = 0;
};

// Walks the runs of box and flat range [begin, begin + count) in ascending order, merging rows that
// touch. The box must have passed CheckBox. Cost: O(dimensions) per run, nothing per skipped row.
class RunIterator {
 public:
  RunIterator(const Shape& shape, const Box& box, int64_t begin, int64_t count);
  bool Next(Run* run);  // false: no more runs

 private:
  int64_t RowBegin(int64_t row) const;  // flat index of a row's first element

  int outer_ = 0;                        // dimensions that are stepped through
  int64_t extent_[kMaxDimensions] = {};  // of the stepped dimensions
  int64_t stride_[kMaxDimensions] = {};
  int64_t base_ = 0;  // flat index of the box's first element
  int64_t row_length_ = 1;
  int64_t row_count_ = 1;
  int64_t row_ = 0;
  int64_t begin_ = 0;
  int64_t end_ = 0;
};

// How the contributions to one tensor combine.
enum class Mode : uint8_t {
  kSum,          // every element comes from the same number (>= 1) of contributors, summed by rank
  kExactlyOnce,  // every element comes from exactly one contributor
  kNone,         // frozen in this generation: no contributor may give boxes; absent in every step
};

// One contributor's part of one tensor. Boxes are disjoint. A box's index here is its region id.
struct Contribution {
  TensorId tensor = 0;
  Mode mode = Mode::kSum;
  std::vector<Box> boxes;
};

struct TensorSpec {
  std::string name;
  Shape shape;
  bool receives_gradient = true;  // false for buffers: no layout may mention them
};

// A contiguous range of one tensor's flattened elements: the unit of ownership and version.
struct ShardSpec {
  TensorId tensor = 0;
  int64_t begin = 0;
  int64_t count = 0;
  std::vector<int32_t> copies;  // servers that may hold it (indices of the sorted peer list), in
                                // order of preference; the first in-sync one is the primary
};

// Contribution layout of a generation: by rank, that contributor's tensors (each at most once).
struct Layout {
  std::vector<std::vector<Contribution>> by_rank;
  Digest digest;  // DigestLayout(by_rank)

  int world_size() const { return static_cast<int>(by_rank.size()); }
};

// Identity of one contributor's part, and of a whole layout.
Digest DigestContributions(const std::vector<Contribution>& contributions);
Digest DigestLayout(const std::vector<std::vector<Contribution>>& by_rank);

// Checks a layout against the manifest. InvalidArgument naming tensor, rank and numbers for: a bad
// tensor id or box, a tensor twice by one rank, different modes for one tensor, overlap within a
// rank, a gap, uneven multiplicity (kSum), an element given twice (kExactlyOnce), a parameter
// nobody mentions, a buffer that somebody does. ResourceExhausted for more than `kMaxLayoutWork`
// box visits.
inline constexpr int64_t kMaxLayoutWork = 20'000'000;
absl::Status ValidateLayout(const std::vector<TensorSpec>& tensors, const Layout& layout);

// A piece of a shard that a contributor is expected to push.
struct ExpectedPiece {
  Rank rank = 0;
  int32_t region = 0;     // index of the box in the contributor's Contribution
  int64_t box_begin = 0;  // the piece is elements [box_begin, box_begin + count) of the box
  int64_t count = 0;
  friend bool operator==(const ExpectedPiece&, const ExpectedPiece&) = default;
};

// Every piece of the shard under a validated layout, by ascending rank, then region.
std::vector<ExpectedPiece> ExpectedPieces(const std::vector<TensorSpec>& tensors,
                                          const ShardSpec& shard, const Layout& layout);

}  // namespace orlop::step
