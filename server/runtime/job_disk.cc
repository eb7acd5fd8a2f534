#include "server/runtime/job_disk.h"

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "server/job/step_codec.h"
#include "server/runtime/job_opening.h"
#include "server/step/job.h"
#include "spdlog/spdlog.h"

namespace orlop::server {

absl::Status JobDisk::Write(const std::function<absl::Status()>& write) {
  if (is_closed_) return absl::CancelledError(absl::StrCat("job '", job_, "' was deleted"));
  absl::Status status = write();
  MutexLock lock(&mutex_);
  if (!status.ok() && status_.ok())
    spdlog::error("job {}: waits for the disk: {}", job_, std::string(status.message()));
  status_ = status;
  return status;
}

absl::Status JobDisk::WriteEpoch(int64_t epoch) {
  MutexLock lock(&write_mutex_);
  return Write([&] { return data_->PersistEpoch(job_, static_cast<uint64_t>(epoch)); });
}

absl::StatusOr<bool> JobDisk::WriteRecord(const step::JobRecord& record) {
  MutexLock lock(&write_mutex_);
  if (record.version != record_version_ + 1) return false;
  absl::Status status = Write([&] { return data_->PutValue(RecordKey(job_), Serialize(record)); });
  if (!status.ok()) return status;
  record_version_ = record.version;
  return true;
}

absl::Status JobDisk::WriteCleanMark() {
  MutexLock lock(&write_mutex_);
  return Write([&] { return data_->PutValue(CleanKey(job_), absl::StrCat(data_->incarnation())); });
}

absl::Status JobDisk::EraseCleanMark() {
  MutexLock lock(&write_mutex_);
  return Write([&] { return data_->EraseValue(CleanKey(job_)); });
}

void JobDisk::Close() {
  MutexLock lock(&write_mutex_);
  is_closed_ = true;
}

absl::Status JobDisk::status() const {
  MutexLock lock(&mutex_);
  return status_;
}

}  // namespace orlop::server
