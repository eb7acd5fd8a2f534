// Checksums of the wire and of staged bytes: XXH3 (https://github.com/Cyan4973/xxHash,
// doc/xxhash_spec.md), seed 0.
//
// Every byte is hashed once, with XXH3-64 per leaf of 1 MiB. The digest of a piece is XXH3-128 over
// its leaf hashes, little endian, in order, so it does not depend on the size of the chunks. The
// checksum of a chunk of at most one leaf is its leaf hash; of a longer one it is the XXH3-64 over
// its leaf hashes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"

struct XXH3_state_s;  // XXH3_state_t

namespace orlop {

inline constexpr size_t kLeafBytes = 1 << 20;  // unit of checksums

struct Digest128 {
  uint64_t high = 0;
  uint64_t low = 0;

  bool empty() const { return high == 0 && low == 0; }  // no digest
  friend bool operator==(const Digest128&, const Digest128&) = default;
  friend auto operator<=>(const Digest128&, const Digest128&) = default;
};

std::string ToString(const Digest128& digest);  // 32 hexadecimal digits

uint64_t Checksum64(const void* bytes, size_t size);
Digest128 Digest(const void* bytes, size_t size);

// Returns the leaf hashes of a contiguous chunk that starts at a leaf boundary.
std::vector<uint64_t> LeafHashes(absl::Span<const char> chunk);
// Returns the chunk's checksum from its leaf hashes (at least one).
uint64_t ChunkChecksum(absl::Span<const uint64_t> leaves);

// Collects the leaf hashes of one piece, in order. Not thread-safe.
class PieceDigest {
 public:
  void AddLeaves(absl::Span<const uint64_t> leaves) {
    leaves_.insert(leaves_.end(), leaves.begin(), leaves.end());
  }
  Digest128 Finish() const;

 private:
  std::vector<uint64_t> leaves_;
};

// Hashes a chunk that arrives in parts (network slices), leaf by leaf. Not thread-safe.
class ChunkHasher {
 public:
  ChunkHasher();
  ~ChunkHasher();
  void Add(const void* bytes, size_t size);
  // Returns the leaf hashes of all bytes added since the last Finish; the last leaf may be short.
  std::vector<uint64_t> Finish();

 private:
  std::unique_ptr<XXH3_state_s, void (*)(XXH3_state_s*)> state_;
  size_t filled_bytes_ = 0;  // bytes in the current leaf
  std::vector<uint64_t> leaves_;
};

}  // namespace orlop
