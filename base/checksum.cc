#include "base/checksum.h"

#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/types/span.h"

namespace orlop {
namespace {

static_assert(std::endian::native == std::endian::little,
              "leaf hashes are hashed as little-endian words in place");

Digest128 FromXxh(XXH128_hash_t hash) { return {hash.high64, hash.low64}; }

}  // namespace

std::string ToString(const Digest128& digest) {
  return absl::StrFormat("%016x%016x", digest.high, digest.low);
}

uint64_t Checksum64(const void* bytes, size_t size) { return XXH3_64bits(bytes, size); }

Digest128 Digest(const void* bytes, size_t size) { return FromXxh(XXH3_128bits(bytes, size)); }

std::vector<uint64_t> LeafHashes(absl::Span<const char> chunk) {
  std::vector<uint64_t> leaves;
  leaves.reserve(chunk.size() / kLeafBytes + 1);
  for (size_t offset = 0; offset < chunk.size(); offset += kLeafBytes)
    leaves.push_back(
        Checksum64(chunk.data() + offset, std::min(kLeafBytes, chunk.size() - offset)));
  return leaves;
}

uint64_t ChunkChecksum(absl::Span<const uint64_t> leaves) {
  return leaves.size() == 1 ? leaves[0]
                            : Checksum64(leaves.data(), leaves.size() * sizeof(uint64_t));
}

Digest128 PieceDigest::Finish() const {
  return Digest(leaves_.data(), leaves_.size() * sizeof(uint64_t));
}

ChunkHasher::ChunkHasher()
    : state_(XXH3_createState(), [](XXH3_state_s* state) { XXH3_freeState(state); }) {
  XXH3_64bits_reset(state_.get());
}

ChunkHasher::~ChunkHasher() = default;

void ChunkHasher::Add(const void* bytes, size_t size) {
  const char* next = static_cast<const char*>(bytes);
  while (size > 0) {
    const size_t part = std::min(size, kLeafBytes - filled_bytes_);
    XXH3_64bits_update(state_.get(), next, part);
    next += part;
    size -= part;
    filled_bytes_ += part;
    if (filled_bytes_ < kLeafBytes) break;
    leaves_.push_back(XXH3_64bits_digest(state_.get()));
    XXH3_64bits_reset(state_.get());
    filled_bytes_ = 0;
  }
}

std::vector<uint64_t> ChunkHasher::Finish() {
  if (filled_bytes_ > 0) {
    leaves_.push_back(XXH3_64bits_digest(state_.get()));
    XXH3_64bits_reset(state_.get());
    filled_bytes_ = 0;
  }
  return std::exchange(leaves_, {});
}

}  // namespace orlop
