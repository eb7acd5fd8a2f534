#include "server/step/identity.h"

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace orlop::step {
namespace {

// The finaliser of SplitMix64 (Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators,
// 2014): a bijection, so one field alone never collides.
uint64_t Mix(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

}  // namespace

DigestBuilder& DigestBuilder::Add(uint64_t value) {
  high_ = Mix(high_ + value + 0x9e3779b97f4a7c15);
  low_ = Mix(std::rotl(low_, 29) ^ (value * 0xff51afd7ed558ccd)) + high_;
  return *this;
}

DigestBuilder& DigestBuilder::AddBytes(std::string_view bytes) {
  Add(bytes.size());
  for (size_t begin = 0; begin < bytes.size(); begin += 8) {
    const std::string_view part = bytes.substr(begin, 8);
    uint64_t word = 0;  // little-endian by construction, on any machine
    for (size_t i = 0; i < part.size(); ++i) {
      word |= static_cast<uint64_t>(static_cast<unsigned char>(part[i])) << (8 * i);
    }
    Add(word);
  }
  return *this;
}

DigestBuilder& DigestBuilder::AddDouble(double value) {
  return Add(std::bit_cast<uint64_t>(value));
}

Digest DigestBuilder::Finish() const {
  Digest digest{Mix(high_ ^ 0x2545f4914f6cdd1d), Mix(low_ ^ std::rotl(high_, 17))};
  if (digest.empty()) digest.low = 1;
  return digest;
}

}  // namespace orlop::step
