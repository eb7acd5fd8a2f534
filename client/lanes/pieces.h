// Pieces: what a part becomes once it is cut along shards. The unit that is sent, fetched, hashed
// and retried.
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
  v1::Region region;     // as it goes on the wire; shard always set
  char* data = nullptr;  // in the caller's memory; only read in a push
  size_t bytes = 0;
  std::optional<uint64_t> applied_count;
  std::optional<Digest128> digest;         // once hashed whole
  std::atomic<bool>* cancelled = nullptr;  // set: need not be sent any more
  bool done = false;
};

// What the two kinds of part have in common.
struct PartView {
  uint32_t tensor = 0;
  std::string_view slot;  // never empty
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  const std::optional<Box>* box = nullptr;
  char* data = nullptr;
  size_t bytes = 0;
  std::optional<uint64_t> applied_count;
};

// Cuts a part along the shards that it meets and appends the pieces in ascending order of shard.
// The elements of a box inside a shard are one contiguous range of the box's row-major buffer
// (base/box.h), so a piece is one range of the caller's memory. Of a flat box of whole blocks, the
// absmax of a quantised slot (an fp32 per block) and its 4-bit codes (two to a byte) may be given
// as they are stored. Data of DTYPE_I8_BLOCK are the encoded pieces one after another, each with
// blocks of its own.
//   Statuses  InvalidArgument for an unknown index, a box outside the tensor, or a buffer of
//   another size.
absl::Status SplitPart(const PartView& part, const Manifest& manifest, std::vector<Piece>* pieces);

// The flat slice of rank `rank` of `world_size` (ContributionLayout.FLAT_SLICES) of a tensor;
// absent: empty.
std::optional<Box> FlatSlice(uint64_t element_count, uint32_t rank, uint32_t world_size);

}  // namespace orlop::client
