// A part (client/link/parts.h) is a box of one slot in the worker's memory. A piece is the section
// of a part that is inside one shard: the unit that is sent, fetched, hashed and retried. This file
// cuts parts into pieces.
//   Threads  The functions are pure. A Piece has no lock: one thread moves it at a time.
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
  // Index in the manifest.
  uint32_t tensor = 0;
  // The region as sent. Its `shard` is always set.
  v1::Region region;
  // The piece's bytes in the caller's memory, `bytes` long, not owned. A push only reads them.
  char* data = nullptr;
  size_t bytes = 0;
  // SetState only: PushPart::applied_count.
  std::optional<uint64_t> applied_count;
  // A push sets it once it has hashed the whole piece. It is compared with the digest that the
  // server has stored.
  std::optional<Digest128> digest;
  // The flag of the operation that the piece belongs to, not owned; null if the piece cannot be
  // cancelled. Any thread may set the flag. Once it is true, the piece is not sent any more.
  std::atomic<bool>* cancelled = nullptr;
  // True once the server has stored the piece (push), or all bytes are in `data` (pull).
  bool done = false;
};

// The fields of a PushPart or PullPart, which must outlive the view. Their meaning is described
// there. `data` of a PushPart is only read.
struct PartView {
  uint32_t tensor = 0;
  // The slot's name, never empty: the caller has filled in the default.
  std::string_view slot;
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  // Not null. Absent box: the whole tensor.
  const std::optional<Box>* box = nullptr;
  char* data = nullptr;
  size_t bytes = 0;
  std::optional<uint64_t> applied_count;
};

// Cuts a part at shard boundaries and appends its pieces in ascending order of shard. A box's
// elements inside one shard are one contiguous range of the box's row-major buffer (base/box.h), so
// each piece is one range of the caller's memory.
//
// If the box is flat and begins at a multiple of 256, the data may be the stored form of a
// quantised slot; its size decides:
//   slot "<slot>_absmax", DTYPE_F32     one fp32 for each block of 256 elements (8-bit slot) or 128
//                                       (4-bit slot)
//   other slots but "weight", DTYPE_U8  one byte for each element (8-bit codes), or for each two
//                                       elements (4-bit codes)
// Data of DTYPE_I8_BLOCK are the encoded pieces one after another. Each piece is encoded by itself,
// in blocks of 256 elements that begin at its first element.
//   Status  InvalidArgument (BAD_REQUEST) for an unknown tensor index or dtype, a box outside the
//           tensor, or data of another size than the box needs. Nothing is appended then.
absl::Status SplitPart(const PartView& part, const Manifest& manifest, std::vector<Piece>* pieces);

// Returns the flat slice that rank `rank` of `world_size` ranks pushes
// (ContributionLayout.FLAT_SLICES) of a tensor of `element_count` elements. A slice has
// ceil(element_count / world_size) elements, rounded up to a multiple of 256; the slice at the end
// of the tensor may be shorter, and those after it are empty. Absent if the slice is empty. `rank`
// must be below `world_size`.
std::optional<Box> FlatSlice(uint64_t element_count, uint32_t rank, uint32_t world_size);

}  // namespace orlop::client
