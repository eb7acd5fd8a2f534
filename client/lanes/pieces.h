// A piece is the part of a box inside one shard. It is the unit that is sent, fetched, hashed and
// retried. This file cuts parts into pieces.
#pragma once

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "base/checksum.h"
#include "client/link/manifest.h"
#include "client/link/parts.h"

namespace orlop::client {

struct Piece {
  uint32_t tensor = 0;
  // The region as sent; `shard` is always set.
  v1::Region region;
  // The piece's bytes in the caller's memory. A push only reads them.
  char* data = nullptr;
  size_t bytes = 0;
  std::optional<uint64_t> applied_count;
  // Set once the whole piece has been hashed.
  std::optional<Digest128> digest;
  // If it is set and true, the piece need not be sent any more.
  std::atomic<bool>* cancelled = nullptr;
  bool done = false;
};

// The fields that PushPart and PullPart share.
struct PartView {
  uint32_t tensor = 0;
  // Never empty.
  std::string_view slot;
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  const std::optional<Box>* box = nullptr;
  char* data = nullptr;
  size_t bytes = 0;
  std::optional<uint64_t> applied_count;
};

// Cuts a part at shard boundaries and appends its pieces in ascending order of shard. A box's
// elements inside one shard are one contiguous range of the box's row-major buffer (base/box.h), so
// each piece is one range of the caller's memory. If the box is flat and has whole blocks, the data
// may also be the stored form of a quantised slot: one fp32 absmax per block, or 4-bit codes, two
// to a byte. Data of DTYPE_I8_BLOCK are the encoded pieces one after another, each with blocks of
// its own.
//   Status  InvalidArgument for an unknown index, a box outside the tensor, or a buffer of another
//           size.
absl::Status SplitPart(const PartView& part, const Manifest& manifest, std::vector<Piece>* pieces);

// Returns rank `rank`'s flat slice (ContributionLayout.FLAT_SLICES) of a tensor of `element_count`
// elements; absent if the slice is empty.
std::optional<Box> FlatSlice(uint64_t element_count, uint32_t rank, uint32_t world_size);

}  // namespace orlop::client
