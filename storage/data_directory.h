// A server's data directory. One process uses it at a time, and it belongs to one server for ever.
// It holds the facts that must outlive the process.
//
//   DIR/LOCK      held with flock by the running process; holds its pid
//   DIR/IDENTITY  "orlop data directory 1\nserver NAME\n"
//   DIR/STARTED   number of the last process that has started its jobs, as decimal text
//   DIR/VALUES    digest of the small values of the store (storage/marked_store.h)
//   DIR/store/    RocksDB (storage/store.h)
//
// Only its user may read the directory (mode 0700), unless another user has made it.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "storage/marked_store.h"
#include "storage/store.h"

namespace orlop::storage {

struct DataDirectoryOptions {
  std::string path;
  // 1 to 256 bytes, one line.
  std::string server_name;
  // Limit of RocksDB's own memory.
  uint64_t store_memory_bytes = 32 << 20;
  // Wraps the store. Tests insert a store that fails (storage/testing/faulty_store.h).
  std::function<std::unique_ptr<Store>(std::unique_ptr<Store>)> wrap_store;
};

// Threads: all methods are safe from any thread.
class DataDirectory {
 public:
  // Creates the directory if it is missing, locks it and checks its owner.
  //   Status  Unavailable if a process uses it (the message names directory and pid),
  //           FailedPrecondition if it belongs to another server, which the message names, or holds
  //           other files, InvalidArgument, DataLoss, ResourceExhausted.
  static absl::StatusOr<std::unique_ptr<DataDirectory>> Open(const DataDirectoryOptions& options);
  ~DataDirectory();  // unlocks the directory

  const std::string& path() const { return path_; }
  // Returns a number, from 1, that no earlier process of this directory had. Open has synced it.
  uint64_t incarnation() const { return incarnation_; }
  Store& store() { return *store_; }
  // Whether the store came back other than its last process has left it. What it says of the newest
  // state of a job is not true then; a flush that can be read is still a flush.
  bool has_lost_writes() const { return marked_->has_lost_writes(); }
  // Writes and syncs, apart from the store, that this process starts its jobs: what the store has
  // lost is known by now. Status: DataLoss, ResourceExhausted, InvalidArgument.
  absl::Status MarkStarted();
  // Returns the number of the last earlier process that has called MarkStarted; 0: none is known.
  // If the store says that an earlier one was the last, the store is older than this file.
  uint64_t last_started() const { return last_started_; }

  // Stores and syncs the highest epoch of a job that this server has accepted. Status:
  // FailedPrecondition if a higher one is stored, DataLoss, ResourceExhausted.
  absl::Status PersistEpoch(const std::string& job, uint64_t epoch);
  // Returns the stored epoch, or 0 if there is none.
  absl::StatusOr<uint64_t> Epoch(const std::string& job) const;

  // Small values that callers store under keys of their own choice. Writes are synced. GetValue
  // returns NotFound for an unknown key.
  absl::Status PutValue(const std::string& key, const std::string& value);
  absl::StatusOr<std::string> GetValue(const std::string& key) const;
  absl::Status EraseValue(const std::string& key);

  // Looks whether the directory is where it was, for presence(). Call it now and then.
  void Look();
  // Unavailable: the directory was removed or replaced when Look was last called. What is written
  // then is lost with the process.
  absl::Status presence() const;

  // Returns the bytes that the files of the store take on the file system now; 0 if they cannot be
  // listed.
  uint64_t StoreBytes() const;
  // Returns the free bytes of the file system, as available to an ordinary user.
  absl::StatusOr<uint64_t> FreeBytes() const;

 private:
  DataDirectory() = default;

  std::string path_;
  int lock_fd_ = -1;  // of DIR/LOCK
  uint64_t incarnation_ = 0;
  uint64_t last_started_ = 0;
  std::atomic<bool> is_there_ = true;
  std::unique_ptr<Store> store_;
  MarkedStore* marked_ = nullptr;  // below store_
};

}  // namespace orlop::storage
