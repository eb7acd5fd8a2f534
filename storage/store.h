// What Orlop asks of a disk: small values that change atomically, and large ones that are written
// once.
//
// Keys are bytes, ordered. Small values and large ones ("bulk") live in separate spaces. A bulk
// value is never overwritten: it is written under a new key, made durable by Sync, named by a small
// value in a Commit, and erased by a later Commit.
//   Threads  all methods are safe from any thread.
//   Status   ResourceExhausted: no space left. DataLoss: the disk answered something else than what
//   was written, or not at all
//            (I/O error). Both name the key. A method that failed has had no effect that a reader
//            can see, but for bulk values that were not yet named.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace orlop::storage {

// Changes that happen together, in any order: keys are distinct.
struct Batch {
  std::vector<std::pair<std::string, std::string>> put;
  std::vector<std::string> erase;
  std::vector<std::string> erase_bulk;  // unknown keys are ignored
};

class Store {
 public:
  virtual ~Store() = default;

  // Writes a large value under a new key. Durable after the next Sync that returns OK.
  //   Status  AlreadyExists (the key is in use), ResourceExhausted, DataLoss.
  virtual absl::Status WriteBulk(const std::string& key, absl::Span<const uint8_t> bytes) = 0;
  // Reads a large value of exactly out.size() bytes.
  //   Status  NotFound, DataLoss (another size, damaged, or unreadable; `out` is then undefined).
  virtual absl::Status ReadBulk(const std::string& key, absl::Span<uint8_t> out) const = 0;
  // Makes every WriteBulk that returned before durable. Status ResourceExhausted, DataLoss.
  virtual absl::Status Sync() = 0;

  // Applies a batch atomically and durably. Status ResourceExhausted, DataLoss.
  virtual absl::Status Commit(const Batch& batch) = 0;
  // Status NotFound, DataLoss.
  virtual absl::StatusOr<std::string> Get(const std::string& key) const = 0;
  // Small values whose key begins with `prefix`, ascending. Status DataLoss.
  virtual absl::StatusOr<std::vector<std::pair<std::string, std::string>>> Scan(
      const std::string& prefix) const = 0;
  // Bulk keys that begin with `prefix`, ascending. Status DataLoss.
  virtual absl::StatusOr<std::vector<std::string>> ScanBulk(const std::string& prefix) const = 0;

  // Bytes of memory that the engine holds now for itself, by its own count: caches, write buffers,
  // indexes of open files.
  virtual uint64_t MemoryBytes() const { return 0; }
};

// Opens or creates a store in RocksDB (storage/rocksdb_store.cc). One process at a time.
//   memory_bytes  bound of RocksDB's own memory: block cache and write buffers together. At least 8
//   MiB. Status        DataLoss (damaged), Unavailable (in use by another process),
//   ResourceExhausted, InvalidArgument.
absl::StatusOr<std::unique_ptr<Store>> OpenRocksDbStore(const std::string& directory,
                                                        uint64_t memory_bytes);

}  // namespace orlop::storage
