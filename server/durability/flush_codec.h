// The encoding of the head and the index of a flush. A number is a u64, little endian. A double is
// a u64 with its bits, and a digest is its high and its low u64. A string is its size and its
// bytes; a list of numbers is its size and the numbers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/checksum.h"
#include "proto/status.h"

namespace orlop::server {

// Returns DataLoss (LOST) for `what`, the part of a flush that is damaged.
inline absl::Status DamagedFlush(const std::string& what, const std::string& why) {
  return MakeError(absl::StatusCode::kDataLoss, absl::StrCat("flush: ", what, ": ", why),
                   v1::ErrorDetail::LOST);
}

class Encoder {
 public:
  Encoder& Add(uint64_t value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
    return *this;
  }
  Encoder& Add(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return Add(bits);
  }
  Encoder& Add(const Digest128& digest) { return Add(digest.high).Add(digest.low); }
  Encoder& Add(const std::string& value) {
    Add(static_cast<uint64_t>(value.size()));
    bytes_.append(value);
    return *this;
  }
  Encoder& Add(const std::vector<uint64_t>& values) {
    Add(static_cast<uint64_t>(values.size()));
    for (uint64_t value : values) Add(value);
    return *this;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

// Reads what Encoder wrote, in the same order. The caller has verified the checksum of `bytes`,
// which must outlive the decoder. If the bytes end too early all the same, they have another
// format. ok() is then false, and whatever is read is 0 or empty.
class Decoder {
 public:
  explicit Decoder(const std::string& bytes) : bytes_(bytes) {}
  bool ok() const { return ok_; }
  uint64_t Number() {
    uint64_t value = 0;
    if (!Take(sizeof(value))) return 0;
    std::memcpy(&value, bytes_.data() + at_ - sizeof(value), sizeof(value));
    return value;
  }
  double Double() {
    const uint64_t bits = Number();
    double value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  Digest128 Digest() {
    const uint64_t high = Number();
    return {high, Number()};
  }
  std::string String() {
    const uint64_t size = Number();
    return Take(size) ? bytes_.substr(at_ - size, size) : std::string();
  }
  std::vector<uint64_t> Numbers() {
    std::vector<uint64_t> values(std::min<uint64_t>(Number(), bytes_.size() / sizeof(uint64_t)));
    for (uint64_t& value : values) value = Number();
    return values;
  }

 private:
  bool Take(uint64_t size) {
    ok_ = ok_ && size <= bytes_.size() - at_;
    if (ok_) at_ += size;
    return ok_;
  }
  const std::string& bytes_;
  size_t at_ = 0;
  bool ok_ = true;
};

}  // namespace orlop::server
