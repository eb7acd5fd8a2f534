// A MarkedStore keeps a digest of all small values of a store in a file of its own, apart from the
// store's files. It finds out whether the store comes back without its newest writes, or with
// others: RocksDB does not notice a manifest or a log that ends too early. Bulk values are not
// in the digest; what refers to them has their checksums.
//
// Format of the file: four records, 512 bytes apart. The first two are the same, and so are the
// last two; the record with the highest serial counts. Each Commit first writes the pair that does
// not count, and syncs it: its digests are those before and after that Commit, so that a process
// may end between the two writes. Then it writes the other pair, with the digest after it alone; a
// power loss may take this back. Numbers are little endian.
//   record = magic:u64 serial:u64 flags:u64 before_high:u64 before_low:u64 after_high:u64
//            after_low:u64 xxh3-of-all-before:u64
//   flags  = 1: writes were lost, and nobody has taken note of it (Forgive)
//   digest = the sums, over all small values, of the two halves of XXH3-128 of KEY \0 VALUE
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/checksum.h"
#include "base/mutex.h"
#include "storage/store.h"

namespace orlop::storage {

class MarkedStore : public Store {
 public:
  // Compares `store` with the file at `path`. If there is no file, the store is taken as it is.
  // Then keeps the file true with each Commit.
  //   Status  DataLoss: the file is damaged, or a small value cannot be read. As the system says.
  static absl::StatusOr<std::unique_ptr<MarkedStore>> Open(std::unique_ptr<Store> store,
                                                           const std::string& path);
  ~MarkedStore() override;

  // Whether the store is not as its last process has left it. Stays so, over processes, until
  // Forgive; has_lost_writes() of this process does not change.
  bool has_lost_writes() const { return has_lost_writes_; }
  absl::Status Forgive();

  absl::Status WriteBulk(const std::string& key, absl::Span<const uint8_t> bytes) override {
    return store_->WriteBulk(key, bytes);
  }
  absl::Status ReadBulk(const std::string& key, absl::Span<uint8_t> out) const override {
    return store_->ReadBulk(key, out);
  }
  absl::Status Sync() override { return store_->Sync(); }
  absl::Status Commit(const Batch& batch) override;
  absl::StatusOr<std::string> Get(const std::string& key) const override {
    return store_->Get(key);
  }
  absl::StatusOr<std::vector<std::pair<std::string, std::string>>> Scan(
      const std::string& prefix) const override {
    return store_->Scan(prefix);
  }
  absl::StatusOr<std::vector<std::string>> ScanBulk(const std::string& prefix) const override {
    return store_->ScanBulk(prefix);
  }
  absl::Status Reclaim(const std::string& prefix) override { return store_->Reclaim(prefix); }
  uint64_t MemoryBytes() const override { return store_->MemoryBytes(); }

 private:
  MarkedStore(std::unique_ptr<Store> store, std::string path)
      : store_(std::move(store)), path_(std::move(path)) {}
  absl::Status Compare();
  absl::Status Write(const Digest128& before, const Digest128& after) REQUIRES(mutex_);
  absl::Status WriteAndSync(const Digest128& before, const Digest128& after) REQUIRES(mutex_);

  const std::unique_ptr<Store> store_;
  const std::string path_;
  int fd_ = -1;
  std::atomic<bool> has_lost_writes_ = false;
  Mutex mutex_;  // one marked Commit at a time
  uint64_t serial_ GUARDED_BY(mutex_) = 0;
  bool is_forgiven_ GUARDED_BY(mutex_) = true;
  Digest128 sum_ GUARDED_BY(mutex_);
  std::map<std::string, Digest128> digests_ GUARDED_BY(mutex_);  // by key
};

}  // namespace orlop::storage
