// A store in memory. Tests use it instead of a disk, and as the reference for other stores.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "storage/store.h"

namespace orlop::storage {

class MemoryStore : public Store {
 public:
  absl::Status WriteBulk(const std::string& key, absl::Span<const uint8_t> bytes) override {
    MutexLock lock(&mutex_);
    if (!bulk_.emplace(key, std::vector<uint8_t>(bytes.begin(), bytes.end())).second)
      return absl::AlreadyExistsError(absl::StrCat("bulk value '", key, "' exists"));
    return absl::OkStatus();
  }

  absl::Status ReadBulk(const std::string& key, absl::Span<uint8_t> out) const override {
    MutexLock lock(&mutex_);
    const auto found = bulk_.find(key);
    if (found == bulk_.end()) return absl::NotFoundError(absl::StrCat("no bulk value '", key, "'"));
    if (found->second.size() != out.size())
      return absl::DataLossError(absl::StrCat("bulk value '", key, "' has ", found->second.size(),
                                              " bytes; expected ", out.size()));
    std::copy(found->second.begin(), found->second.end(), out.begin());
    return absl::OkStatus();
  }

  absl::Status Sync() override { return absl::OkStatus(); }

  absl::Status Commit(const Batch& batch) override {
    MutexLock lock(&mutex_);
    for (const auto& [key, value] : batch.put) values_[key] = value;
    for (const std::string& key : batch.erase) values_.erase(key);
    for (const std::string& key : batch.erase_bulk) bulk_.erase(key);
    for (const std::string& prefix : batch.erase_bulk_prefixes)
      std::erase_if(bulk_, [&](const auto& value) { return value.first.starts_with(prefix); });
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> Get(const std::string& key) const override {
    MutexLock lock(&mutex_);
    const auto found = values_.find(key);
    if (found == values_.end()) return absl::NotFoundError(absl::StrCat("no value '", key, "'"));
    return found->second;
  }

  absl::StatusOr<std::vector<std::pair<std::string, std::string>>> Scan(
      const std::string& prefix) const override {
    MutexLock lock(&mutex_);
    std::vector<std::pair<std::string, std::string>> found;
    for (auto i = values_.lower_bound(prefix); i != values_.end() && i->first.starts_with(prefix);
         ++i)
      found.push_back(*i);
    return found;
  }

  absl::StatusOr<std::vector<std::string>> ScanBulk(const std::string& prefix) const override {
    MutexLock lock(&mutex_);
    std::vector<std::string> found;
    for (auto i = bulk_.lower_bound(prefix); i != bulk_.end() && i->first.starts_with(prefix); ++i)
      found.push_back(i->first);
    return found;
  }
  absl::Status Reclaim(const std::string&) override { return absl::OkStatus(); }

 private:
  mutable Mutex mutex_;
  std::map<std::string, std::string, std::less<>> values_ GUARDED_BY(mutex_);
  std::map<std::string, std::vector<uint8_t>, std::less<>> bulk_ GUARDED_BY(mutex_);
};

inline std::unique_ptr<Store> NewMemoryStore() { return std::make_unique<MemoryStore>(); }

}  // namespace orlop::storage
