// A store for tests that fails on command: no space, I/O errors, flipped bits, a disk that hangs.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "storage/store.h"

namespace orlop::storage {

class FaultyStore : public Store {
 public:
  explicit FaultyStore(std::unique_ptr<Store> real) : real_(std::move(real)) {}

  // After `count` more writes (bulk, sync or commit) all writes fail with `status`.
  void FailWritesAfter(int count, absl::Status status) {
    MutexLock lock(&mutex_);
    writes_left_ = count;
    failure_ = std::move(status);
  }
  // From now on every write waits for Heal.
  void HangWrites() {
    MutexLock lock(&mutex_);
    hangs_ = true;
  }
  // Waits until a write hangs.
  void AwaitHangingWrite() {
    MutexLock lock(&mutex_);
    while (hanging_count_ == 0) changed_.Wait(&mutex_);
  }
  void Heal() {
    MutexLock lock(&mutex_);
    writes_left_ = -1;
    hangs_ = false;
    changed_.SignalAll();
  }
  // From now on one bit is flipped in (or an error returned for) every read of a bulk value whose
  // key contains `part`. An empty part ends this.
  void FlipReadsOf(std::string part) {
    MutexLock lock(&mutex_);
    flipped_ = std::move(part);
  }
  void FailReadsOf(std::string part) {
    MutexLock lock(&mutex_);
    unreadable_ = std::move(part);
  }

  absl::Status WriteBulk(const std::string& key, absl::Span<const uint8_t> bytes) override {
    absl::Status status = BeforeWrite();
    return status.ok() ? real_->WriteBulk(key, bytes) : status;
  }
  absl::Status ReadBulk(const std::string& key, absl::Span<uint8_t> out) const override {
    MutexLock lock(&mutex_);
    if (Matches(unreadable_, key))
      return absl::DataLossError("read '" + key + "': input/output error");
    absl::Status status = real_->ReadBulk(key, out);
    if (status.ok() && Matches(flipped_, key)) out[out.size() / 2] ^= 1;
    return status;
  }
  absl::Status Sync() override {
    absl::Status status = BeforeWrite();
    return status.ok() ? real_->Sync() : status;
  }
  absl::Status Commit(const Batch& batch) override {
    absl::Status status = BeforeWrite();
    return status.ok() ? real_->Commit(batch) : status;
  }
  absl::StatusOr<std::string> Get(const std::string& key) const override { return real_->Get(key); }
  absl::StatusOr<std::vector<std::pair<std::string, std::string>>> Scan(
      const std::string& prefix) const override {
    return real_->Scan(prefix);
  }
  absl::StatusOr<std::vector<std::string>> ScanBulk(const std::string& prefix) const override {
    return real_->ScanBulk(prefix);
  }
  absl::Status Reclaim(const std::string& prefix) override {
    absl::Status status = BeforeWrite();
    return status.ok() ? real_->Reclaim(prefix) : status;
  }

 private:
  static bool Matches(const std::string& part, const std::string& key) {
    return !part.empty() && key.find(part) != std::string::npos;
  }
  absl::Status BeforeWrite() {
    MutexLock lock(&mutex_);
    ++hanging_count_;
    changed_.SignalAll();
    while (hangs_) changed_.Wait(&mutex_);
    --hanging_count_;
    if (writes_left_ < 0) return absl::OkStatus();
    if (writes_left_ == 0) return failure_;
    --writes_left_;
    return absl::OkStatus();
  }

  const std::unique_ptr<Store> real_;
  mutable Mutex mutex_;
  CondVar changed_;
  bool hangs_ GUARDED_BY(mutex_) = false;
  int hanging_count_ GUARDED_BY(mutex_) = 0;
  int writes_left_ GUARDED_BY(mutex_) = -1;  // -1: no failure is planned
  absl::Status failure_ GUARDED_BY(mutex_);
  std::string flipped_ GUARDED_BY(mutex_), unreadable_ GUARDED_BY(mutex_);
};

}  // namespace orlop::storage
