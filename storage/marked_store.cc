#include "storage/marked_store.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/checksum.h"
#include "base/mutex.h"
#include "storage/store.h"

namespace orlop::storage {
namespace {

constexpr uint64_t kMagic = 0x31736575'6c61764f;  // "Ovalues1"
constexpr size_t kRecordStride = 512;
constexpr size_t kPairBytes = 2 * kRecordStride;

struct Record {
  uint64_t magic = kMagic;
  uint64_t serial = 0;
  uint64_t has_lost_writes = 0;
  Digest128 before, after;
  uint64_t checksum = 0;

  uint64_t Checksum() const { return Checksum64(this, offsetof(Record, checksum)); }
  bool is_whole() const { return magic == kMagic && checksum == Checksum(); }
};
static_assert(sizeof(Record) == 64);

absl::Status SystemError(const std::string& what, const std::string& path, int error) {
  const std::string message = absl::StrCat(what, " ", path, ": ", std::strerror(error));
  if (error == ENOSPC || error == EDQUOT) return absl::ResourceExhaustedError(message);
  return absl::DataLossError(message);
}

Digest128 DigestOf(const std::string& key, const std::string& value) {
  const std::string both = absl::StrCat(key, std::string(1, '\0'), value);
  return Digest(both.data(), both.size());
}
Digest128 Plus(const Digest128& a, const Digest128& b) { return {a.high + b.high, a.low + b.low}; }
Digest128 Minus(const Digest128& a, const Digest128& b) { return {a.high - b.high, a.low - b.low}; }

bool IsMarked(const std::string& key) { return !absl::StartsWith(key, kPassingPrefix); }

}  // namespace

absl::StatusOr<std::unique_ptr<MarkedStore>> MarkedStore::Open(std::unique_ptr<Store> store,
                                                               const std::string& path) {
  auto marked = std::unique_ptr<MarkedStore>(new MarkedStore(std::move(store), path));
  if (absl::Status compared = marked->Compare(); !compared.ok()) return compared;
  return marked;
}

MarkedStore::~MarkedStore() {
  if (fd_ >= 0) close(fd_);
}

absl::Status MarkedStore::Compare() {
  const auto values = store_->Scan("");
  if (!values.ok()) return values.status();
  MutexLock lock(&mutex_);
  for (const auto& [key, value] : *values) {
    if (!IsMarked(key)) continue;
    const Digest128& digest = digests_[key] = DigestOf(key, value);
    sum_ = Plus(sum_, digest);
  }
  fd_ = open(path_.c_str(), O_RDWR | O_CLOEXEC);
  if (fd_ < 0 && errno != ENOENT) return SystemError("open", path_, errno);
  if (fd_ >= 0) {
    Record newest;
    bool is_found = false;
    for (size_t i = 0; i < 4; ++i) {
      Record record;
      const ssize_t size =
          pread(fd_, &record, sizeof(record), static_cast<off_t>(i * kRecordStride));
      if (size < 0) return SystemError("read", path_, errno);
      if (size != sizeof(record) || !record.is_whole()) continue;
      if (!is_found || record.serial > newest.serial) newest = record;
      is_found = true;
    }
    if (!is_found)
      return absl::DataLossError(
          absl::StrCat(path_, " is damaged; remove it to go on with the store beside it as it is"));
    serial_ = newest.serial;
    has_lost_writes_ =
        newest.has_lost_writes != 0 || (sum_ != newest.before && sum_ != newest.after);
    is_forgiven_ = !has_lost_writes_;
    return WriteAndSync(sum_, sum_);
  }
  // The file gets its name when all of it is there.
  const std::string fresh = path_ + ".new";
  fd_ = open(fresh.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd_ < 0) return SystemError("create", fresh, errno);
  for (int pair = 0; pair < 2; ++pair)
    if (absl::Status written = WriteAndSync(sum_, sum_); !written.ok()) return written;
  if (rename(fresh.c_str(), path_.c_str()) != 0) return SystemError("rename", fresh, errno);
  return absl::OkStatus();
}

absl::Status MarkedStore::Write(const Digest128& before, const Digest128& after) {
  Record record;
  record.serial = ++serial_;
  record.has_lost_writes = is_forgiven_ ? 0 : 1;
  record.before = before;
  record.after = after;
  record.checksum = record.Checksum();
  std::array<char, kRecordStride + sizeof(Record)> pair = {};
  std::memcpy(pair.data(), &record, sizeof(record));
  std::memcpy(pair.data() + kRecordStride, &record, sizeof(record));
  const auto at = static_cast<off_t>((serial_ % 2) * kPairBytes);
  const ssize_t written = pwrite(fd_, pair.data(), pair.size(), at);
  if (written < 0) return SystemError("write", path_, errno);
  if (written != static_cast<ssize_t>(pair.size())) return SystemError("write", path_, ENOSPC);
  return absl::OkStatus();
}

absl::Status MarkedStore::WriteAndSync(const Digest128& before, const Digest128& after) {
  if (absl::Status written = Write(before, after); !written.ok()) return written;
  return fdatasync(fd_) == 0 ? absl::OkStatus() : SystemError("sync", path_, errno);
}

absl::Status MarkedStore::Forgive() {
  MutexLock lock(&mutex_);
  if (is_forgiven_) return absl::OkStatus();
  is_forgiven_ = true;
  return WriteAndSync(sum_, sum_);
}

absl::Status MarkedStore::Commit(const Batch& batch) {
  const auto is_marked = [](const auto& entry) { return IsMarked(entry.first); };
  if (std::none_of(batch.put.begin(), batch.put.end(), is_marked) &&
      std::none_of(batch.erase.begin(), batch.erase.end(), IsMarked))
    return store_->Commit(batch);
  MutexLock lock(&mutex_);
  Digest128 after = sum_;
  std::map<std::string, Digest128> fresh;
  for (const auto& [key, value] : batch.put) {
    if (!IsMarked(key)) continue;
    if (const auto old = digests_.find(key); old != digests_.end())
      after = Minus(after, old->second);
    after = Plus(after, fresh[key] = DigestOf(key, value));
  }
  for (const std::string& key : batch.erase)
    if (const auto old = digests_.find(key); old != digests_.end())
      after = Minus(after, old->second);
  if (absl::Status written = WriteAndSync(sum_, after); !written.ok()) return written;
  if (absl::Status committed = store_->Commit(batch); !committed.ok()) return committed;
  sum_ = after;
  for (const auto& [key, digest] : fresh) digests_[key] = digest;
  for (const std::string& key : batch.erase) digests_.erase(key);
  (void)Write(sum_, sum_);  // without it the record before still says what may be
  return absl::OkStatus();
}

}  // namespace orlop::storage
