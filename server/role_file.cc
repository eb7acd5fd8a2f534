#include "server/role_file.h"

#include <sys/stat.h>

#include <fstream>
#include <ios>
#include <memory>
#include <sstream>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "server/services/roles.h"
#include "spdlog/spdlog.h"

namespace orlop::server {
namespace {

bool IsSame(const struct stat& a, const struct stat& b) {
  return a.st_ino == b.st_ino && a.st_size == b.st_size && a.st_mtim.tv_sec == b.st_mtim.tv_sec &&
         a.st_mtim.tv_nsec == b.st_mtim.tv_nsec;
}

}  // namespace

absl::StatusOr<std::unique_ptr<RoleFile>> RoleFile::Open(const std::string& path) {
  std::unique_ptr<RoleFile> file(new RoleFile(path));
  (void)stat(path.c_str(), &file->seen_);  // Read tells an error
  if (absl::Status read = file->Read(); !read.ok()) return read;
  return file;
}

absl::Status RoleFile::Read() {
  std::ifstream in(path_, std::ios::binary);
  std::stringstream text;
  if (!in || !(text << in.rdbuf()))
    return absl::InvalidArgumentError(
        absl::StrCat("--roles ", path_, ": cannot be read, or is empty"));
  absl::StatusOr<Access> access = Access::Parse(text.str(), path_);
  if (!access.ok()) return access.status();
  MutexLock lock(&mutex_);
  access_ = std::make_shared<const Access>(*std::move(access));
  return absl::OkStatus();
}

std::shared_ptr<const Access> RoleFile::access() const {
  MutexLock lock(&mutex_);
  return access_;
}

void RoleFile::Tick() {
  struct stat now = {};
  if (stat(path_.c_str(), &now) != 0 || IsSame(now, seen_)) return;
  seen_ = now;
  const absl::Status read = Read();
  if (read.ok()) return spdlog::info("--roles {} was read again", path_);
  spdlog::error("--roles {} has changed and is not used: {}", path_, std::string(read.message()));
}

}  // namespace orlop::server
