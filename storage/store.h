// The interface to a disk: small values that change atomically, and large ones that are written
// once.
//
// Keys are bytes, ordered. Small values and large ones ("bulk") have separate key spaces. A bulk
// value is never overwritten: it is written under a new key, made durable by Sync, referenced by a
// small value in a Commit, and erased by a later Commit.
//   Threads  All methods are safe from any thread.
//   Status   ResourceExhausted: no space is left.
//            DataLoss: the disk returned other bytes than were written, or failed (I/O error).
//            Both messages name the key. A method that failed has no effect that a reader can see,
//            except that a bulk value no Commit has referenced may exist or not.
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

// Small values below this prefix are of one process alone: nobody misses them after its end.
inline constexpr char kPassingPrefix[] = "spill/";

// Changes that one Commit makes together. All keys are distinct, so their order has no meaning.
struct Batch {
  std::vector<std::pair<std::string, std::string>> put;
  std::vector<std::string> erase;
  std::vector<std::string> erase_bulk;  // unknown keys are ignored
  // Bulk values whose keys begin with one of these are erased unread, so that a damaged one is no
  // obstacle. Not empty.
  std::vector<std::string> erase_bulk_prefixes;
};

class Store {
 public:
  virtual ~Store() = default;

  // Writes a large value under a new key. It is durable after the next Sync that returns OK.
  //   Status  AlreadyExists (the key is in use), ResourceExhausted, DataLoss.
  virtual absl::Status WriteBulk(const std::string& key, absl::Span<const uint8_t> bytes) = 0;
  // Reads a large value of exactly out.size() bytes.
  //   Status  NotFound, DataLoss (another size, damaged, or unreadable). After an error the
  //           contents of `out` are undefined.
  virtual absl::Status ReadBulk(const std::string& key, absl::Span<uint8_t> out) const = 0;
  // Makes durable every bulk value whose WriteBulk returned before this call.
  //   Status  ResourceExhausted, DataLoss.
  virtual absl::Status Sync() = 0;

  // Applies a batch atomically and durably.
  //   Status  ResourceExhausted, DataLoss.
  virtual absl::Status Commit(const Batch& batch) = 0;
  // Returns a small value.
  //   Status  NotFound, DataLoss.
  virtual absl::StatusOr<std::string> Get(const std::string& key) const = 0;
  // Returns the small values whose keys begin with `prefix`, ascending by key.
  //   Status  DataLoss.
  virtual absl::StatusOr<std::vector<std::pair<std::string, std::string>>> Scan(
      const std::string& prefix) const = 0;
  // Returns the bulk keys that begin with `prefix`, ascending. Reads the values, so that a damaged
  // one is an error: for tests and for repair.
  //   Status  DataLoss.
  virtual absl::StatusOr<std::vector<std::string>> ScanBulk(const std::string& prefix) const = 0;

  // Gives the disk space of erased bulk values whose keys begin with `prefix` back to the file
  // system now; without this call it is given back some time later. Reads no value.
  //   Status  ResourceExhausted, DataLoss.
  virtual absl::Status Reclaim(const std::string& prefix) = 0;

  // Returns the bytes of memory that the engine itself uses now, by its own count: caches, write
  // buffers and indexes of open files.
  virtual uint64_t MemoryBytes() const { return 0; }
};

// Opens or creates a store in RocksDB (storage/rocksdb_store.cc). One process may have it open.
//   memory_bytes  limit of RocksDB's own memory (block cache and write buffers together); at least
//                 8 MiB.
//   Status        DataLoss (damaged), Unavailable (in use by another process), ResourceExhausted,
//                 InvalidArgument.
absl::StatusOr<std::unique_ptr<Store>> OpenRocksDbStore(const std::string& directory,
                                                        uint64_t memory_bytes);

}  // namespace orlop::storage
