// A server's data directory: one process at a time, one server for ever, and the few facts that
// outlive a process.
//
//   DIR/LOCK      held with flock by the running process; holds its pid
//   DIR/IDENTITY  "orlop data directory 1\nserver NAME\n"
//   DIR/store/    RocksDB (storage/store.h)
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "storage/store.h"

namespace orlop::storage {

struct DataDirectoryOptions {
  std::string path;
  std::string server_name;                 // 1 to 256 bytes, one line
  uint64_t store_memory_bytes = 32 << 20;  // RocksDB's own memory
  // Tests put a store that fails before the real one.
  std::function<std::unique_ptr<Store>(std::unique_ptr<Store>)> wrap_store;
};

// Threads: all methods are safe from any thread.
class DataDirectory {
 public:
  // Creates the directory where it is missing, locks it and checks whose it is.
  //   Status  Unavailable (in use: names directory and pid), FailedPrecondition (of another server,
  //   by name; or a directory
  //           that holds something else), InvalidArgument, DataLoss, ResourceExhausted.
  static absl::StatusOr<std::unique_ptr<DataDirectory>> Open(const DataDirectoryOptions& options);
  ~DataDirectory();  // unlocks

  const std::string& path() const { return path_; }
  // A number that no earlier process of this directory had, from 1; synced before Open returned.
  uint64_t incarnation() const { return incarnation_; }
  Store& store() { return *store_; }

  // Syncs the highest epoch of a job that this server obeys; a lower one than stored is refused
  // (FailedPrecondition).
  absl::Status PersistEpoch(const std::string& job, uint64_t epoch);
  absl::StatusOr<uint64_t> Epoch(const std::string& job) const;  // 0: none stored

  // Small synced values for whoever needs them; keys are the caller's own space.
  absl::Status PutValue(const std::string& key, const std::string& value);
  absl::StatusOr<std::string> GetValue(const std::string& key) const;  // NotFound
  absl::Status EraseValue(const std::string& key);

  // Free bytes of the file system, as an ordinary user may use them.
  absl::StatusOr<uint64_t> FreeBytes() const;

 private:
  DataDirectory() = default;

  std::string path_;
  int lock_fd_ = -1;
  uint64_t incarnation_ = 0;
  std::unique_ptr<Store> store_;
};

}  // namespace orlop::storage
