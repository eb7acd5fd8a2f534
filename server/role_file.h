// The file of --roles, read again when it changes.
#pragma once

#include <sys/stat.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/services/roles.h"

namespace orlop::server {

class RoleFile {
 public:
  // Status: InvalidArgument, as Access::Parse; the file cannot be read.
  static absl::StatusOr<std::unique_ptr<RoleFile>> Open(const std::string& path);

  // What the file says; any thread.
  std::shared_ptr<const Access> access() const;
  // Reads the file again if it has changed. If it is wrong then, logs that and keeps what it said
  // before. The server's ticker calls it.
  void Tick();

 private:
  explicit RoleFile(std::string path) : path_(std::move(path)) {}
  absl::Status Read();

  const std::string path_;
  struct stat seen_ = {};  // of the ticker
  mutable Mutex mutex_;
  std::shared_ptr<const Access> access_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
