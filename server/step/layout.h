// Contribution layouts: which contributor pushes which boxes of which tensor.
//
// A layout is registered with a generation and checked whole before any push, so that a server
// knows which pieces make a shard complete. Pure functions; safe from any thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "base/box.h"
#include "server/step/identity.h"

namespace orlop::step {

using TensorId = int32_t;  // index in the manifest
using ShardId = int32_t;   // index in manifest order: by tensor, then by begin
using Rank = int32_t;      // contributor, 0 .. world size - 1

// How the contributions to one tensor combine.
enum class Mode : uint8_t {
  kSum,          // every element comes from the same number (>= 1) of contributors, summed by rank
  kExactlyOnce,  // every element comes from exactly one contributor
  kNone,         // frozen in this generation: no contributor may give boxes; absent in every step
};

// The boxes of one tensor that one contributor pushes. They are disjoint. The index of a box in
// `boxes` is its region id.
struct Contribution {
  TensorId tensor = 0;
  Mode mode = Mode::kSum;
  std::vector<Box> boxes;
};

struct TensorSpec {
  std::string name;
  Shape shape;
  bool receives_gradient = true;  // false for buffers: no layout may mention them
  bool may_be_unset = false;      // the first LOAD may leave it out
};

// A contiguous range of one tensor's flattened elements: the unit of ownership and version.
struct ShardSpec {
  TensorId tensor = 0;
  Range range;  // of the tensor's flat elements
  // Servers that may hold it (indices of the sorted peer list), in order of preference. The first
  // in-sync one is the primary.
  std::vector<int32_t> copies;
};

// The contribution layout of a generation. Each rank has at most one Contribution for a tensor.
struct Layout {
  std::vector<std::vector<Contribution>> by_rank;
  Digest digest;  // DigestLayout(by_rank)

  int world_size() const { return static_cast<int>(by_rank.size()); }
};

// Return the identity of the contributions of one rank, and of a whole layout.
Digest DigestContributions(const std::vector<Contribution>& contributions);
Digest DigestLayout(const std::vector<std::vector<Contribution>>& by_rank);

// Returns the bytes that the layout takes in a message and on disk (LayoutBody in
// proto/orlop/v1/peer.proto). A test holds that both are the same.
uint64_t EncodedBytes(const Layout& layout);

// Returns the bytes of memory that contributions take.
uint64_t HeldBytes(const std::vector<Contribution>& contributions);

// Checks a whole layout against the manifest.
//   Status  InvalidArgument, naming tensor, rank and numbers, for a bad tensor id or box, a rank
//           with two contributions to a tensor, ranks with different modes for a tensor, boxes of
//           one rank that overlap, an element from no contributor (a gap), elements from different
//           numbers of contributors (kSum), an element from two (kExactlyOnce), a parameter that no
//           rank mentions, or a buffer that a rank mentions.
//           ResourceExhausted if the check would visit boxes more than kMaxLayoutWork times.
inline constexpr int64_t kMaxLayoutWork = 20'000'000;
absl::Status ValidateLayout(const std::vector<TensorSpec>& tensors, const Layout& layout);

// A piece of a shard that a contributor is expected to push.
struct ExpectedPiece {
  Rank rank = 0;
  int32_t region = 0;  // index of the box in the contributor's Contribution
  Range part;          // the piece is this range of the box's row-major buffer, in elements
  friend bool operator==(const ExpectedPiece&, const ExpectedPiece&) = default;
};

// Returns every piece of the shard under a validated layout, by ascending rank, then region.
std::vector<ExpectedPiece> ExpectedPieces(const std::vector<TensorSpec>& tensors,
                                          const ShardSpec& shard, const Layout& layout);

}  // namespace orlop::step
