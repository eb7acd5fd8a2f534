#include "server/socket_path.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace orlop::server {
namespace {

// Returns whether a process listens at the path of a socket.
absl::StatusOr<bool> IsListening(const std::string& path) {
  sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = {}};
  if (path.size() >= sizeof(address.sun_path))
    return absl::InvalidArgumentError(absl::StrCat("the path ", path, " is too long"));
  std::memcpy(address.sun_path, path.data(), path.size());
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return absl::ErrnoToStatus(errno, "a Unix socket cannot be made");
  const int result = connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address));
  const int error = errno;
  close(fd);
  if (result == 0 || error == EAGAIN) return true;  // EAGAIN: it listens, and does not accept
  if (error == ECONNREFUSED || error == ENOENT) return false;
  return absl::ErrnoToStatus(error, absl::StrCat("cannot tell who listens at ", path));
}

// Removes the socket of a killed process.
absl::Status Clear(const std::string& path) {
  struct stat found = {};
  if (lstat(path.c_str(), &found) != 0) {
    if (errno == ENOENT) return absl::OkStatus();
    return absl::ErrnoToStatus(errno, path);
  }
  if (!S_ISSOCK(found.st_mode))
    return absl::FailedPreconditionError(absl::StrCat(
        path, " exists and is no socket, so it stays; give another path, or remove it"));
  const absl::StatusOr<bool> is_used = IsListening(path);
  if (!is_used.ok()) return is_used.status();
  if (*is_used) return absl::UnavailableError(absl::StrCat("a process listens at ", path));
  if (unlink(path.c_str()) != 0 && errno != ENOENT) return absl::ErrnoToStatus(errno, path);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SocketPath> SocketPath::Take(const std::string& path) {
  const std::string lock = path + ".lock";
  const int fd = open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd < 0)
    return absl::InvalidArgumentError(
        absl::StrCat(lock, " cannot be opened: ", std::strerror(errno)));
  SocketPath taken(fd);
  if (flock(fd, LOCK_EX | LOCK_NB) != 0)
    return absl::UnavailableError(absl::StrCat("another server has the lock ", lock));
  if (absl::Status cleared = Clear(path); !cleared.ok()) return cleared;
  return taken;
}

SocketPath& SocketPath::operator=(SocketPath&& other) noexcept {
  std::swap(lock_fd_, other.lock_fd_);
  return *this;
}

SocketPath::~SocketPath() {
  if (lock_fd_ >= 0) close(lock_fd_);
}

}  // namespace orlop::server
