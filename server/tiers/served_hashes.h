// The leaf hashes (base/checksum.h) of what readers were sent of one shard at one version, so that
// what many read is hashed once. A server whose memory damages a byte later sends the hash of what
// was right, and its reader notices.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "base/mutex.h"
#include "orlop/v1/types.pb.h"
#include "server/job/slots.h"

namespace orlop::server {

// Threads: all methods are safe from any thread.
class ServedHashes {
 public:
  // What is read of the whole shard.
  using Values = std::pair<Slot, v1::DType>;

  // Returns the hashes of the leaves [first, first + count); nullopt unless all are known.
  std::optional<std::vector<uint64_t>> Find(Values values, size_t first, size_t count) const {
    MutexLock lock(&mutex_);
    const auto known = known_.find(values);
    if (known == known_.end() || known->second.size() < first + count) return std::nullopt;
    const auto begin = known->second.begin() + static_cast<std::ptrdiff_t>(first);
    return std::vector<uint64_t>(begin, begin + static_cast<std::ptrdiff_t>(count));
  }
  // Keeps the hashes of the leaves from `first` on, if those before them are known.
  void Add(Values values, size_t first, absl::Span<const uint64_t> leaves) {
    MutexLock lock(&mutex_);
    std::vector<uint64_t>& known = known_[values];
    if (known.size() == first) known.insert(known.end(), leaves.begin(), leaves.end());
  }

 private:
  mutable Mutex mutex_;
  std::map<Values, std::vector<uint64_t>> known_ GUARDED_BY(mutex_);  // from the first leaf on
};

}  // namespace orlop::server
