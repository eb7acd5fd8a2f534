// What step machines compare: 128-bit identities, never numbers alone and never struct memory.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace orlop::step {

// A 128-bit digest. All zero means "none". Content digests (payloads, staged bytes) come from the
// shell (XXH3-128); identities of records come from DigestBuilder.
struct Digest {
  uint64_t high = 0;
  uint64_t low = 0;

  bool empty() const { return high == 0 && low == 0; }
  friend bool operator==(const Digest&, const Digest&) = default;
  friend auto operator<=>(const Digest&, const Digest&) = default;
};

// 32 lower-case hexadecimal digits, for messages.
std::string ToString(const Digest& digest);

// Mixes fields, in the order added, into a digest that is the same on every machine. Lengths are
// mixed with bytes, so "ab","c" differs from "a","bc". Not cryptographic: it separates records that
// differ by accident, and peers are trusted. Never returns the empty digest.
class DigestBuilder {
 public:
  DigestBuilder& Add(uint64_t value);
  DigestBuilder& Add(const Digest& digest) { return Add(digest.high).Add(digest.low); }
  DigestBuilder& AddBytes(std::string_view bytes);
  DigestBuilder& AddDouble(double value);  // the bits, so -0.0 differs from 0.0
  Digest Finish() const;

 private:
  uint64_t high_ = 0x9e3779b97f4a7c15;
  uint64_t low_ = 0xc2b2ae3d27d4eb4f;
};

}  // namespace orlop::step
