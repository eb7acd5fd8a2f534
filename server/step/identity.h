// 128-bit identities. Step machines compare records by them, never by step or attempt numbers alone
// and never by the memory of structs.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/checksum.h"

namespace orlop::step {

// The shell computes digests of contents (payloads, staged bytes); DigestBuilder computes the
// identities of records. An empty digest means "none".
using Digest = Digest128;

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
