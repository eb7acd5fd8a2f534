// The small values of one job on disk: its epoch, the leader's record, and the mark of a clean
// stop.
//   Threads  all methods are safe from any thread. Writes wait for the disk, one after another;
//            status() never waits for it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/step/job.h"
#include "storage/data_directory.h"

namespace orlop::server {

class JobDisk {
 public:
  // `record_version`: of the leader's record that is stored now; 0 if there is none.
  JobDisk(storage::DataDirectory* data, std::string job, int64_t record_version)
      : data_(data), job_(std::move(job)), record_version_(record_version) {}

  // Each write is synced. After Close it returns Cancelled, and nothing is written. Other errors
  // are the disk's own.
  absl::Status WriteEpoch(int64_t epoch);
  // Returns false, and writes nothing, if the stored record is not the one before `record`.
  absl::StatusOr<bool> WriteRecord(const step::JobRecord& record);
  absl::Status WriteCleanMark();
  absl::Status EraseCleanMark();

  // The job was deleted: what is written later would be taken for a later job of this name.
  void Close();

  // The error of the last write; OK if it succeeded.
  absl::Status status() const;

 private:
  absl::Status Write(const std::function<absl::Status()>& write) REQUIRES(write_mutex_);

  storage::DataDirectory* const data_;
  const std::string job_;
  Mutex write_mutex_;  // one write at a time; taken before mutex_
  bool is_closed_ GUARDED_BY(write_mutex_) = false;
  int64_t record_version_ GUARDED_BY(write_mutex_) = 0;
  mutable Mutex mutex_;
  absl::Status status_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
