#include "storage/data_directory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "spdlog/spdlog.h"
#include "storage/marked_store.h"
#include "storage/store.h"

namespace orlop::storage {
namespace {

constexpr char kIdentityHead[] = "orlop data directory 1\nserver ";
constexpr char kIncarnationKey[] = "directory/incarnation";

absl::Status SystemError(const std::string& what, const std::string& path, int error) {
  const std::string message = absl::StrCat(what, " ", path, ": ", std::strerror(error));
  if (error == ENOSPC || error == EDQUOT) return absl::ResourceExhaustedError(message);
  if (error == EACCES || error == EPERM || error == EROFS || error == ENOTDIR || error == ENOENT)
    return absl::InvalidArgumentError(message);
  return absl::DataLossError(message);
}

absl::Status SyncDirectory(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return SystemError("open", path, errno);
  const int error = fsync(fd) == 0 ? 0 : errno;
  close(fd);
  return error == 0 ? absl::OkStatus() : SystemError("sync", path, error);
}

// Writes and syncs a small file under another name, then renames it, so that a reader sees all of
// it or none.
absl::Status WriteFile(const std::string& directory, const std::string& name,
                       const std::string& contents) {
  const std::string path = directory + "/" + name, fresh = path + ".new";
  const int fd = open(fresh.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return SystemError("create", fresh, errno);
  const ssize_t written = write(fd, contents.data(), contents.size());
  int error = written == static_cast<ssize_t>(contents.size()) ? 0 : written < 0 ? errno : ENOSPC;
  if (error == 0 && fsync(fd) != 0) error = errno;
  if (close(fd) != 0 && error == 0) error = errno;
  if (error == 0 && rename(fresh.c_str(), path.c_str()) != 0) error = errno;
  return error == 0 ? SyncDirectory(directory) : SystemError("write", path, error);
}

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno == ENOENT ? absl::NotFoundError(path) : SystemError("open", path, errno);
  std::string contents(4096, '\0');
  const ssize_t size = read(fd, contents.data(), contents.size());
  const int error = size < 0 ? errno : 0;
  close(fd);
  if (error != 0) return SystemError("read", path, error);
  contents.resize(size);
  return contents;
}

// The kernel holds the lock and releases it when the process ends, in whatever way. The pid in the
// file only serves the error message.
absl::StatusOr<int> Lock(const std::string& directory) {
  const std::string path = directory + "/LOCK";
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (fd < 0) return SystemError("open", path, errno);
  if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    close(fd);
    if (error != EWOULDBLOCK) return SystemError("lock", path, error);
    const std::string pid(absl::StripAsciiWhitespace(ReadFile(path).value_or("unknown")));
    return absl::UnavailableError(
        absl::StrCat("data directory ", directory, " is in use by process ", pid));
  }
  const std::string pid = absl::StrCat(getpid(), "\n");
  if (ftruncate(fd, 0) != 0 ||
      pwrite(fd, pid.data(), pid.size(), 0) != static_cast<ssize_t>(pid.size())) {
    const int error = errno;
    close(fd);
    return SystemError("write", path, error);
  }
  return fd;
}

// Returns FailedPrecondition if the directory belongs to another server. A new directory becomes
// `server_name`'s.
absl::Status CheckIdentity(const std::string& directory, const std::string& server_name) {
  absl::StatusOr<std::string> identity = ReadFile(directory + "/IDENTITY");
  if (absl::IsNotFound(identity.status())) {
    for (const auto& entry : std::filesystem::directory_iterator(directory)) {
      const std::string name = entry.path().filename();
      if (name != "LOCK" && name != "IDENTITY.new")
        return absl::FailedPreconditionError(absl::StrCat(
            directory, " is not an orlop data directory: it holds '", name, "' and no IDENTITY"));
    }
    return WriteFile(directory, "IDENTITY", absl::StrCat(kIdentityHead, server_name, "\n"));
  }
  if (!identity.ok()) return identity.status();
  absl::string_view name = *identity;
  if (!absl::ConsumePrefix(&name, kIdentityHead) || !absl::ConsumeSuffix(&name, "\n"))
    return absl::DataLossError(absl::StrCat(directory, "/IDENTITY is damaged"));
  if (name != server_name)
    return absl::FailedPreconditionError(absl::StrCat("data directory ", directory,
                                                      " belongs to server '", name, "', not to '",
                                                      server_name, "'"));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<DataDirectory>> DataDirectory::Open(
    const DataDirectoryOptions& options) {
  if (options.server_name.empty() || options.server_name.size() > 256 ||
      options.server_name.find('\n') != std::string::npos)
    return absl::InvalidArgumentError(
        absl::StrCat("server name '", options.server_name, "': 1 to 256 bytes on one line"));
  std::error_code error;
  std::filesystem::create_directories(options.path, error);
  if (error) return SystemError("create", options.path, error.value());
  auto lock = Lock(options.path);
  if (!lock.ok()) return lock.status();
  auto directory = std::unique_ptr<DataDirectory>(new DataDirectory());
  directory->path_ = options.path;
  directory->lock_fd_ = *lock;
  (void)chmod(options.path.c_str(), S_IRWXU);  // refused if another user made the directory
  if (absl::Status own = CheckIdentity(options.path, options.server_name); !own.ok()) return own;
  auto store = OpenRocksDbStore(options.path + "/store", options.store_memory_bytes);
  if (!store.ok()) return store.status();
  auto marked = MarkedStore::Open(*std::move(store), options.path + "/VALUES");
  if (!marked.ok()) return marked.status();
  directory->marked_ = marked->get();
  if (directory->has_lost_writes())
    spdlog::error(
        "{}/store has lost its newest writes, or has others than its last process made: no job "
        "goes on by itself, and newer flushes than those that are offered may be missing",
        options.path);
  directory->store_ =
      options.wrap_store ? options.wrap_store(*std::move(marked)) : *std::move(marked);

  auto started = ReadFile(options.path + "/STARTED");
  if (!started.ok() && !absl::IsNotFound(started.status())) return started.status();
  if (started.ok() &&
      !absl::SimpleAtoi(absl::StripAsciiWhitespace(*started), &directory->last_started_))
    return absl::DataLossError(absl::StrCat(options.path, "/STARTED is damaged; remove it"));

  auto incarnation = directory->store_->Get(kIncarnationKey);
  if (incarnation.ok() && !absl::SimpleAtoi(*incarnation, &directory->incarnation_))
    return absl::DataLossError(
        absl::StrCat(options.path, ": incarnation '", *incarnation, "' is not a number"));
  if (!incarnation.ok() && !absl::IsNotFound(incarnation.status())) return incarnation.status();
  // A store that has lost the last number must not give it away again.
  directory->incarnation_ = std::max(directory->incarnation_, directory->last_started_) + 1;
  absl::Status stored =
      directory->store_->Commit({{{kIncarnationKey, absl::StrCat(directory->incarnation_)}}});
  if (!stored.ok()) return stored;
  return directory;
}

absl::Status DataDirectory::MarkStarted() {
  absl::Status written = WriteFile(path_, "STARTED", absl::StrCat(incarnation_, "\n"));
  return written.ok() ? marked_->Forgive() : written;
}

DataDirectory::~DataDirectory() {
  store_.reset();
  if (lock_fd_ >= 0) close(lock_fd_);
}

absl::Status DataDirectory::PersistEpoch(const std::string& job, uint64_t epoch) {
  auto stored = Epoch(job);
  if (!stored.ok()) return stored.status();
  if (epoch < *stored)
    return absl::FailedPreconditionError(
        absl::StrCat("epoch ", epoch, " of job '", job, "' is below the stored ", *stored));
  if (epoch == *stored) return absl::OkStatus();
  return store_->Commit({{{absl::StrCat("epoch/", job), absl::StrCat(epoch)}}});
}

absl::StatusOr<uint64_t> DataDirectory::Epoch(const std::string& job) const {
  auto stored = store_->Get(absl::StrCat("epoch/", job));
  if (absl::IsNotFound(stored.status())) return 0;
  if (!stored.ok()) return stored.status();
  uint64_t epoch = 0;
  if (!absl::SimpleAtoi(*stored, &epoch))
    return absl::DataLossError(
        absl::StrCat("epoch '", *stored, "' of job '", job, "' is not a number"));
  return epoch;
}

absl::Status DataDirectory::PutValue(const std::string& key, const std::string& value) {
  return store_->Commit({{{absl::StrCat("value/", key), std::string(value)}}});
}
absl::StatusOr<std::string> DataDirectory::GetValue(const std::string& key) const {
  return store_->Get(absl::StrCat("value/", key));
}
absl::Status DataDirectory::EraseValue(const std::string& key) {
  return store_->Commit({{}, {absl::StrCat("value/", key)}});
}

void DataDirectory::Look() {
  struct stat held = {}, found = {};
  is_there_ = fstat(lock_fd_, &held) == 0 && stat((path_ + "/LOCK").c_str(), &found) == 0 &&
              held.st_dev == found.st_dev && held.st_ino == found.st_ino;
}

absl::Status DataDirectory::presence() const {
  if (is_there_) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat(
      "data directory ", path_,
      " was removed or replaced, so no step is made; put it back, or export the weights"));
}

uint64_t DataDirectory::StoreBytes() const {
  constexpr uint64_t kBlockBytes = 512;  // the unit of st_blocks
  uint64_t bytes = 0;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(path_ + "/store", error)) {
    struct stat file = {};
    if (stat(entry.path().c_str(), &file) == 0)
      bytes += static_cast<uint64_t>(file.st_blocks) * kBlockBytes;
  }
  return bytes;
}

absl::StatusOr<uint64_t> DataDirectory::FreeBytes() const {
  struct statvfs system;
  if (statvfs(path_.c_str(), &system) != 0) return SystemError("statvfs", path_, errno);
  return static_cast<uint64_t>(system.f_bavail) * system.f_frsize;
}

}  // namespace orlop::storage
