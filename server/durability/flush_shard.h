// One shard in a flush: its entry in the index and its bulk values.
//
// Numbers are u64, little endian; strings are their size and their bytes. Under the flush's prefix:
// "SHARD/SLOT", "SHARD/gradient", "SHARD/piece-N", "SHARD/load-SLOT", each with its size and
// XXH3-64 in the index.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "proto/status.h"
#include "server/shards/shard.h"
#include "storage/store.h"

namespace orlop::server {

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

// Reads what Encoder wrote. The bytes were checked by their checksum: running out means another
// format, told by ok().
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

// Reads and fills the internals of a ShardStore. The caller holds the shard (Shard::Acquire).
class FlushAccess {
 public:
  FlushAccess(ShardStore* shards, std::string prefix)
      : shards_(shards), prefix_(std::move(prefix)) {}

  const std::vector<std::unique_ptr<Shard>>& all() const { return shards_->shards_; }
  void BeginLoad() { ++shards_->loads_; }

  absl::Status WriteShard(storage::Store* store, int64_t step, Shard* shard,
                          Encoder* index) NO_THREAD_SAFETY_ANALYSIS;
  absl::Status LoadShard(const storage::Store& store, bool with_staged, int64_t step, Shard* shard,
                         Decoder* index) NO_THREAD_SAFETY_ANALYSIS;

 private:
  std::string Key(const Shard& shard, const std::string& name) const {
    return prefix_ + absl::StrFormat("%08x/", shard.info.id) + name;
  }
  static std::string What(const Shard& shard, const std::string& name) {
    return absl::StrCat(shard.Name(), ", ", name);
  }

  // Size and checksum go to the index, 0 for no bytes.
  absl::Status WriteBytes(storage::Store* store, const Shard& shard, const std::string& name,
                          const BufferPtr& bytes, Encoder* index);
  absl::Status ReadBytes(const storage::Store& store, const Shard& shard, const std::string& name,
                         uint64_t checksum, Buffer* out);
  absl::Status WriteGradient(storage::Store* store, const Shard& shard, GradientStage* stage,
                             Encoder* index) NO_THREAD_SAFETY_ANALYSIS;
  absl::Status WriteLoad(storage::Store* store, const Shard& shard, LoadStage* stage,
                         Encoder* index) NO_THREAD_SAFETY_ANALYSIS;
  absl::Status LoadSlot(const storage::Store& store, Shard* shard, Slot slot,
                        Decoder* index) NO_THREAD_SAFETY_ANALYSIS;
  absl::Status LoadGradient(const storage::Store& store, bool keep, Shard* shard,
                            Decoder* index) NO_THREAD_SAFETY_ANALYSIS;
  absl::Status LoadLoad(const storage::Store& store, bool keep, Shard* shard,
                        Decoder* index) NO_THREAD_SAFETY_ANALYSIS;
  // A staging buffer read from disk; skipped (null) unless `keep`.
  absl::StatusOr<BufferPtr> ReadStaged(const storage::Store& store, bool keep, const Shard& shard,
                                       const std::string& name, Decoder* index);

  ShardStore* const shards_;
  const std::string prefix_;
};

}  // namespace orlop::server
