// This file implements Store with RocksDB. Small values are in the default column family; each
// Commit writes and syncs the write-ahead log. Bulk values are in a second column family, as blob
// files. A bulk value is cut into parts of 1 MiB, so that no write buffer has to hold a whole
// value. Bulk writes skip the log: Sync flushes the write buffers to synced files before a Commit
// references the values.
#include <rocksdb/cache.h>
#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/listener.h>
#include <rocksdb/options.h>
#include <rocksdb/table.h>
#include <rocksdb/write_buffer_manager.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/types/span.h"
#include "spdlog/spdlog.h"
#include "storage/store.h"

namespace orlop::storage {
namespace {

constexpr size_t kPartBytes = 1 << 20;
// A write buffer is an eighth of the memory (BoundMemory): one part at least.
constexpr uint64_t kLeastMemoryBytes = 8 << 20;
constexpr char kBulkFamily[] = "bulk";

// Puts RocksDB's errors into the log. RocksDB would write them to a file of its own, but the writer
// of that file ends the process if the disk is full.
class ErrorLog : public rocksdb::Logger {
 public:
  ErrorLog() : rocksdb::Logger(rocksdb::InfoLogLevel::ERROR_LEVEL) {}
  using rocksdb::Logger::Logv;
  void Logv(const char* format, va_list arguments) override {
    char line[512];
    std::vsnprintf(line, sizeof(line), format, arguments);
    spdlog::error("rocksdb: {}", line);
  }
};

// A compaction that meets a damaged file fails, and would make the whole store read-only. What is
// in the file is lost to those who read it; all others go on, without the compaction.
class DamageListener : public rocksdb::EventListener {
 public:
  void OnBackgroundError(rocksdb::BackgroundErrorReason reason, rocksdb::Status* error) override {
    if (reason != rocksdb::BackgroundErrorReason::kCompaction || !error->IsCorruption()) return;
    if (!std::exchange(is_told_, true))
      spdlog::error("rocksdb: a damaged file cannot be compacted, and takes its room for ever: {}",
                    error->ToString());
    *error = rocksdb::Status::OK();
  }

 private:
  bool is_told_ = false;  // RocksDB calls it under its own lock
};

// Translates a status. `what` is put before the message. Every error that has no code of its own
// here, an I/O error too, is DataLoss.
absl::Status FromRocksDb(const rocksdb::Status& status, const std::string& what) {
  if (status.ok()) return absl::OkStatus();
  const std::string message = absl::StrCat(what, ": ", status.ToString());
  if (status.IsNotFound()) return absl::NotFoundError(message);
  if (status.IsNoSpace()) return absl::ResourceExhaustedError(message);
  if (status.IsInvalidArgument()) return absl::InvalidArgumentError(message);
  return absl::DataLossError(message);
}

// Returns the key of one part of a bulk value. Keys contain no byte 0, so the parts of a key sort
// before every other key that begins with it. They are the range [PartKey(key, 0), key + "\1").
std::string PartKey(const std::string& key, size_t part) {
  return key + std::string(1, '\0') + absl::StrFormat("%08x", part);
}

class RocksDbStore : public Store {
 public:
  RocksDbStore(rocksdb::DB* db, rocksdb::ColumnFamilyHandle* values,
               rocksdb::ColumnFamilyHandle* bulk, std::shared_ptr<rocksdb::Cache> cache)
      : db_(db), values_(values), bulk_(bulk), cache_(std::move(cache)) {}
  ~RocksDbStore() override {
    db_->DestroyColumnFamilyHandle(values_);
    db_->DestroyColumnFamilyHandle(bulk_);
    db_->Close();
  }

  absl::Status WriteBulk(const std::string& key, absl::Span<const uint8_t> bytes) override {
    std::string first;
    const rocksdb::Status seen = db_->Get(rocksdb::ReadOptions(), bulk_, PartKey(key, 0), &first);
    if (seen.ok()) return absl::AlreadyExistsError(absl::StrCat("bulk value '", key, "' exists"));
    if (!seen.IsNotFound()) return FromRocksDb(seen, absl::StrCat("read '", key, "'"));
    rocksdb::WriteOptions options;
    options.disableWAL = true;
    // An empty value has one part, which is empty.
    for (size_t part = 0; part == 0 || part * kPartBytes < bytes.size(); ++part) {
      const absl::Span<const uint8_t> piece = bytes.subspan(part * kPartBytes, kPartBytes);
      const rocksdb::Slice value(reinterpret_cast<const char*>(piece.data()), piece.size());
      absl::Status status = FromRocksDb(db_->Put(options, bulk_, PartKey(key, part), value),
                                        absl::StrCat("write '", key, "'"));
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  absl::Status ReadBulk(const std::string& key, absl::Span<uint8_t> out) const override {
    rocksdb::PinnableSlice value;
    for (size_t part = 0; part == 0 || part * kPartBytes < out.size(); ++part) {
      value.Reset();
      absl::Status status = FromRocksDb(db_->Get(Verified(), bulk_, PartKey(key, part), &value),
                                        absl::StrCat("read '", key, "'"));
      if (absl::IsNotFound(status) && part > 0) return absl::DataLossError(status.message());
      if (!status.ok()) return status;
      const absl::Span<uint8_t> piece = out.subspan(part * kPartBytes, kPartBytes);
      if (value.size() != piece.size())
        return WrongSize(key, part * kPartBytes + value.size(), out.size());
      std::memcpy(piece.data(), value.data(), piece.size());
    }
    // If there is one more part, the stored value is longer than `out`.
    const size_t parts = std::max<size_t>(1, (out.size() + kPartBytes - 1) / kPartBytes);
    const rocksdb::Status more = db_->Get(Verified(), bulk_, PartKey(key, parts), &value);
    if (more.ok()) return WrongSize(key, out.size() + value.size(), out.size());
    return more.IsNotFound() ? absl::OkStatus()
                             : FromRocksDb(more, absl::StrCat("read '", key, "'"));
  }

  absl::Status Sync() override {
    return FromRocksDb(db_->Flush(rocksdb::FlushOptions(), bulk_), "sync of bulk values");
  }

  absl::Status Commit(const Batch& batch) override {
    rocksdb::WriteBatch changes;
    for (const auto& [key, value] : batch.put) changes.Put(values_, key, value);
    for (const std::string& key : batch.erase) changes.Delete(values_, key);
    for (const std::string& key : batch.erase_bulk)
      changes.DeleteRange(bulk_, PartKey(key, 0), key + "\1");
    for (const std::string& prefix : batch.erase_bulk_prefixes)
      changes.DeleteRange(bulk_, prefix, prefix + "\xff");
    rocksdb::WriteOptions options;
    options.sync = true;
    return FromRocksDb(db_->Write(options, &changes), "commit");
  }

  absl::StatusOr<std::string> Get(const std::string& key) const override {
    std::string value;
    absl::Status status =
        FromRocksDb(db_->Get(Verified(), values_, key, &value), absl::StrCat("read '", key, "'"));
    if (!status.ok()) return status;
    return value;
  }

  absl::StatusOr<std::vector<std::pair<std::string, std::string>>> Scan(
      const std::string& prefix) const override {
    std::vector<std::pair<std::string, std::string>> found;
    const std::unique_ptr<rocksdb::Iterator> i(db_->NewIterator(Verified(), values_));
    for (i->Seek(prefix); i->Valid() && i->key().starts_with(prefix); i->Next())
      found.emplace_back(i->key().ToString(), i->value().ToString());
    absl::Status status = FromRocksDb(i->status(), absl::StrCat("scan '", prefix, "'"));
    if (!status.ok()) return status;
    return found;
  }

  absl::StatusOr<std::vector<std::string>> ScanBulk(const std::string& prefix) const override {
    std::vector<std::string> found;
    const std::unique_ptr<rocksdb::Iterator> i(db_->NewIterator(Verified(), bulk_));
    for (i->Seek(prefix); i->Valid() && i->key().starts_with(prefix);) {
      const std::string_view key(i->key().data(), i->key().size());
      found.emplace_back(key.substr(0, key.find('\0')));
      i->Seek(found.back() + "\1");  // past the other parts of this key
    }
    absl::Status status = FromRocksDb(i->status(), absl::StrCat("scan '", prefix, "'"));
    if (!status.ok()) return status;
    return found;
  }

  // RocksDB deletes a blob file once a compaction has dropped the last key that refers to it. Keys
  // below an erasure are dropped unread.
  absl::Status Reclaim(const std::string& prefix) override {
    rocksdb::CompactRangeOptions options;
    options.exclusive_manual_compaction = false;
    options.bottommost_level_compaction = rocksdb::BottommostLevelCompaction::kForce;
    const std::string end = prefix + "\xff";
    const rocksdb::Slice first(prefix), last(end);
    return FromRocksDb(db_->CompactRange(options, bulk_, &first, &last),
                       absl::StrCat("reclaim '", prefix, "'"));
  }

  uint64_t MemoryBytes() const override {
    uint64_t bytes = cache_->GetUsage();
    for (const auto& property : {rocksdb::DB::Properties::kSizeAllMemTables,
                                 rocksdb::DB::Properties::kEstimateTableReadersMem}) {
      uint64_t all_families = 0;
      if (db_->GetAggregatedIntProperty(property, &all_families)) bytes += all_families;
    }
    return bytes;
  }

 private:
  static rocksdb::ReadOptions Verified() {
    rocksdb::ReadOptions options;
    options.verify_checksums = true;
    // Bulk values are read in a cycle that is longer than the cache, which would never hit.
    options.fill_cache = false;
    return options;
  }
  static absl::Status WrongSize(const std::string& key, size_t actual, size_t expected) {
    return absl::DataLossError(absl::StrCat("bulk value '", key, "' has at least ", actual,
                                            " bytes; expected ", expected));
  }

  const std::unique_ptr<rocksdb::DB> db_;
  rocksdb::ColumnFamilyHandle* const values_;
  rocksdb::ColumnFamilyHandle* const bulk_;
  const std::shared_ptr<rocksdb::Cache> cache_;
};

// Sets the limits of RocksDB's memory in both options, and returns the block cache. Half of the
// memory is for the block cache. The other half is for write buffers: two for each of the two
// column families, so that one fills while the other is written to disk.
std::shared_ptr<rocksdb::Cache> BoundMemory(uint64_t memory_bytes, rocksdb::DBOptions* options,
                                            rocksdb::ColumnFamilyOptions* family) {
  const auto cache = rocksdb::NewLRUCache(memory_bytes / 2);
  options->write_buffer_manager = std::make_shared<rocksdb::WriteBufferManager>(
      memory_bytes / 2, nullptr, /*allow_stall=*/true);
  rocksdb::BlockBasedTableOptions table;
  table.block_cache = cache;
  table.cache_index_and_filter_blocks = true;
  family->table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  family->write_buffer_size = memory_bytes / 8;
  family->arena_block_size = 64 << 10;
  family->max_write_buffer_number = 2;
  return cache;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Store>> OpenRocksDbStore(const std::string& directory,
                                                        uint64_t memory_bytes) {
  if (memory_bytes < kLeastMemoryBytes)
    return absl::InvalidArgumentError(absl::StrCat("RocksDB memory of ", memory_bytes,
                                                   " bytes; the least is ", kLeastMemoryBytes));
  std::error_code unused;
  // RocksDB logs an error if the directory does not exist. An error of this call is ignored: the
  // open then fails with RocksDB's message, which is the better one.
  std::filesystem::create_directories(directory, unused);
  rocksdb::DBOptions options;
  rocksdb::ColumnFamilyOptions values_options;
  options.create_if_missing = true;
  options.create_missing_column_families = true;
  options.paranoid_checks = true;
  options.use_fsync = true;
  options.max_background_jobs = 2;
  options.max_total_wal_size = 8 << 20;
  options.info_log = std::make_shared<ErrorLog>();
  options.listeners.push_back(std::make_shared<DamageListener>());
  options.max_open_files = 256;
  // No Commit references what Sync has not written. Besides, RocksDB 7.8 aborts if a flush at the
  // end follows one that has failed.
  options.avoid_flush_during_shutdown = true;
  // Files that cannot be compacted (DamageListener) must not stop writes either.
  constexpr int kNever = 1 << 30;
  values_options.level0_slowdown_writes_trigger = kNever;
  values_options.level0_stop_writes_trigger = kNever;
  const std::shared_ptr<rocksdb::Cache> cache =
      BoundMemory(memory_bytes, &options, &values_options);
  rocksdb::ColumnFamilyOptions bulk_options = values_options;
  bulk_options.enable_blob_files = true;
  bulk_options.min_blob_size = 4 << 10;
  bulk_options.blob_file_size = 64 << 20;
  // RocksDB's blob garbage collection is off. It copied values that were still in use, and so wrote
  // twenty times as many bytes as the caller. It is not needed: every Sync begins a new file, and
  // the values of one file are erased together, so whole files become free.
  bulk_options.enable_blob_garbage_collection = false;
  bulk_options.compression = rocksdb::kNoCompression;
  values_options.compression = rocksdb::kNoCompression;
  std::vector<rocksdb::ColumnFamilyHandle*> handles;
  rocksdb::DB* db = nullptr;
  const rocksdb::Status status = rocksdb::DB::Open(
      options, directory,
      {{rocksdb::kDefaultColumnFamilyName, values_options}, {kBulkFamily, bulk_options}}, &handles,
      &db);
  // RocksDB reports an I/O error of the file LOCK if another process has the store open.
  if (status.IsIOError() && status.ToString().find("LOCK") != std::string::npos)
    return absl::UnavailableError(absl::StrCat("store in ", directory, ": ", status.ToString()));
  if (!status.ok()) return FromRocksDb(status, absl::StrCat("open store in ", directory));
  return std::unique_ptr<Store>(std::make_unique<RocksDbStore>(db, handles[0], handles[1], cache));
}

}  // namespace orlop::storage
