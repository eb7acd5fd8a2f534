// The path of a Unix socket that a server listens on.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace orlop::server {

// The right to listen at a path, until the object is destroyed. One process has it at a time, by a
// lock on the file PATH.lock, which stays.
class SocketPath {
 public:
  // Takes the path, and removes the socket that a killed process has left there. Nothing else is
  // removed.
  //   Status  Unavailable: a process listens there, or has the lock. FailedPrecondition: something
  //           that is no socket lies there. InvalidArgument: no file can be made there.
  static absl::StatusOr<SocketPath> Take(const std::string& path);
  SocketPath(SocketPath&& other) noexcept : lock_fd_(other.lock_fd_) { other.lock_fd_ = -1; }
  SocketPath& operator=(SocketPath&& other) noexcept;
  SocketPath() = default;
  ~SocketPath();

 private:
  explicit SocketPath(int lock_fd) : lock_fd_(lock_fd) {}

  int lock_fd_ = -1;
};

}  // namespace orlop::server
