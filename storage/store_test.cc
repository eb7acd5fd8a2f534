#include "storage/store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <ios>
#include <memory>
#include <random>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "storage/data_directory.h"
#include "storage/testing/memory_store.h"

namespace orlop::storage {
namespace {

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string pattern = (std::filesystem::temp_directory_path() / "orlop_store_XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

std::vector<uint8_t> Bytes(size_t size, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint8_t> bytes(size);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

// Tests the contract of store.h on every implementation.
class StoreContract : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override { Open(); }
  void Open() {
    if (std::string(GetParam()) == "memory") {
      store_ = NewMemoryStore();
      return;
    }
    store_.reset();
    auto opened = OpenRocksDbStore(directory_.path(), 16 << 20);
    ASSERT_TRUE(opened.ok()) << opened.status();
    store_ = *std::move(opened);
  }
  TemporaryDirectory directory_;
  std::unique_ptr<Store> store_;
};

TEST_P(StoreContract, ReturnsBulkValuesAsWritten) {
  for (const size_t size :
       {size_t{1}, size_t{4095}, size_t{1 << 20}, size_t{(1 << 20) + 1}, size_t{5 << 20}}) {
    const std::string key = "bulk/" + std::to_string(size);
    const auto bytes = Bytes(size, size);
    ASSERT_TRUE(store_->WriteBulk(key, bytes).ok());
    EXPECT_TRUE(absl::IsAlreadyExists(store_->WriteBulk(key, bytes)));
    std::vector<uint8_t> read(size);
    ASSERT_TRUE(store_->ReadBulk(key, absl::MakeSpan(read)).ok());
    EXPECT_EQ(read, bytes);
  }
  ASSERT_TRUE(store_->Sync().ok());
}

TEST_P(StoreContract, RefusesAnotherSize) {
  ASSERT_TRUE(store_->WriteBulk("a", Bytes(2 << 20, 1)).ok());
  for (const size_t size : {size_t{100}, size_t{1 << 20}, size_t{3 << 20}}) {
    std::vector<uint8_t> read(size);
    EXPECT_TRUE(absl::IsDataLoss(store_->ReadBulk("a", absl::MakeSpan(read)))) << size;
  }
  std::vector<uint8_t> read(1);
  EXPECT_TRUE(absl::IsNotFound(store_->ReadBulk("b", absl::MakeSpan(read))));
}

TEST_P(StoreContract, CommitsTogetherAndScansInOrder) {
  ASSERT_TRUE(store_->WriteBulk("x/1", Bytes(10, 1)).ok());
  ASSERT_TRUE(store_->WriteBulk("x/10", Bytes(2 << 20, 2)).ok());
  ASSERT_TRUE(store_->WriteBulk("y", Bytes(10, 3)).ok());
  ASSERT_TRUE(store_->Commit({{{"k/2", "two"}, {"k/1", "one"}, {"l", "other"}}}).ok());
  EXPECT_THAT(store_->Scan("k/").value(),
              testing::ElementsAre(testing::Pair("k/1", "one"), testing::Pair("k/2", "two")));
  EXPECT_THAT(store_->ScanBulk("x/").value(), testing::ElementsAre("x/1", "x/10"));
  ASSERT_TRUE(store_->Commit({{{"k/1", "new"}}, {"k/2"}, {"x/1", "never written"}}).ok());
  EXPECT_EQ(store_->Get("k/1").value(), "new");
  EXPECT_TRUE(absl::IsNotFound(store_->Get("k/2").status()));
  EXPECT_THAT(store_->ScanBulk("x/").value(), testing::ElementsAre("x/10"));
  std::vector<uint8_t> read(10);
  EXPECT_TRUE(absl::IsNotFound(store_->ReadBulk("x/1", absl::MakeSpan(read))));
  EXPECT_TRUE(store_->ReadBulk("y", absl::MakeSpan(read)).ok());
}

TEST_P(StoreContract, ErasesBulkValuesByPrefix) {
  for (const char* key : {"x", "x/1", "x/10", "x0", "x/\xc3\xa9", "y/1"})
    ASSERT_TRUE(store_->WriteBulk(key, Bytes(2 << 20, 1)).ok());
  storage::Batch erased;
  erased.erase_bulk_prefixes = {"x/", "z/"};
  ASSERT_TRUE(store_->Commit(erased).ok());
  EXPECT_THAT(store_->ScanBulk("").value(), testing::ElementsAre("x", "x0", "y/1"));
  ASSERT_TRUE(store_->WriteBulk("x/1", Bytes(10, 2)).ok());
  EXPECT_THAT(store_->ScanBulk("x/").value(), testing::ElementsAre("x/1"));
}

TEST_P(StoreContract, WritesAKeyAgainAfterItsErasure) {
  ASSERT_TRUE(store_->WriteBulk("a", Bytes(3 << 20, 1)).ok());
  ASSERT_TRUE(store_->Commit({{}, {}, {"a"}}).ok());
  const auto bytes = Bytes(1 << 20, 2);
  ASSERT_TRUE(store_->WriteBulk("a", bytes).ok());
  std::vector<uint8_t> read(1 << 20);
  ASSERT_TRUE(store_->ReadBulk("a", absl::MakeSpan(read)).ok());
  EXPECT_EQ(read, bytes);
}

INSTANTIATE_TEST_SUITE_P(All, StoreContract, testing::Values("memory", "rocksdb"),
                         [](const auto& info) { return std::string(info.param); });

TEST(RocksDbStore, MissingFileIsDataLossWhateverItsPath) {
  TemporaryDirectory directory;
  auto store = OpenRocksDbStore(directory.path() + "/blockstorage", 16 << 20).value();
  const auto bytes = Bytes(9 << 20, 7);
  ASSERT_TRUE(store->WriteBulk("lock", bytes).ok());
  ASSERT_TRUE(store->Sync().ok());
  int removed = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory.path() + "/blockstorage"))
    if (entry.path().extension() == ".blob") removed += std::filesystem::remove(entry);
  ASSERT_GT(removed, 0);
  std::vector<uint8_t> read(bytes.size());
  const absl::Status status = store->ReadBulk("lock", absl::MakeSpan(read));
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
}

TEST(RocksDbStore, KeepsSyncedValuesWhenReopened) {
  TemporaryDirectory directory;
  const auto bytes = Bytes(9 << 20, 7);
  {
    auto store = OpenRocksDbStore(directory.path(), 16 << 20).value();
    ASSERT_TRUE(store->WriteBulk("a", bytes).ok());
    ASSERT_TRUE(store->Sync().ok());
    ASSERT_TRUE(store->Commit({{{"k", "v"}}}).ok());
    EXPECT_TRUE(absl::IsUnavailable(OpenRocksDbStore(directory.path(), 16 << 20).status()));
  }
  auto store = OpenRocksDbStore(directory.path(), 16 << 20).value();
  std::vector<uint8_t> read(bytes.size());
  ASSERT_TRUE(store->ReadBulk("a", absl::MakeSpan(read)).ok());
  EXPECT_EQ(read, bytes);
  EXPECT_EQ(store->Get("k").value(), "v");
}

TEST(RocksDbStore, TellsTheMemoryOfItsWriteBuffers) {
  TemporaryDirectory directory;
  auto store = OpenRocksDbStore(directory.path(), 16 << 20).value();
  const uint64_t before = store->MemoryBytes();
  ASSERT_TRUE(store->WriteBulk("a", Bytes(1 << 20, 7)).ok());
  EXPECT_GE(store->MemoryBytes(), before + (1 << 20));
  EXPECT_LE(store->MemoryBytes(), 16 << 20);
  ASSERT_TRUE(store->Sync().ok());
  EXPECT_LT(store->MemoryBytes(), before + (1 << 20));
}

// Spilled values are each written anew and synced once a step, and then the old one is erased. A
// flush is kept all the while.
TEST(RocksDbStore, GivesBackTheSpaceOfErasedValues) {
  TemporaryDirectory directory;
  auto store = OpenRocksDbStore(directory.path(), 16 << 20).value();
  const auto bytes = Bytes(1 << 20, 7);
  constexpr int kValues = 4, kSteps = 30;  // enough to tell growth from a lag
  auto key = [](int value, int step) { return std::to_string(value) + "/" + std::to_string(step); };
  for (int i = 0; i < kValues; ++i)
    ASSERT_TRUE(store->WriteBulk("flush" + std::to_string(i), bytes).ok());
  uint64_t largest = 0;
  for (int step = 0; step < kSteps; ++step)
    for (int i = 0; i < kValues; ++i) {
      ASSERT_TRUE(store->WriteBulk(key(i, step), bytes).ok());
      ASSERT_TRUE(store->Sync().ok());
      ASSERT_TRUE(store->Commit({{}, {}, {key(i, step - 1)}}).ok());
      uint64_t used = 0;
      for (const auto& entry : std::filesystem::recursive_directory_iterator(directory.path())) {
        std::error_code gone;  // files may vanish during the walk
        const uint64_t size = entry.file_size(gone);
        used += gone ? 0 : size;
      }
      largest = std::max(largest, used);
    }
  const uint64_t written = bytes.size() * kSteps * kValues;
  EXPECT_LE(largest, written / 3) << "of " << written << " written";
}

TEST(RocksDbStore, FindsAFlippedByteOnDisk) {
  TemporaryDirectory directory;
  const auto bytes = Bytes(1 << 20, 7);
  {
    auto store = OpenRocksDbStore(directory.path(), 16 << 20).value();
    ASSERT_TRUE(store->WriteBulk("a", bytes).ok());
    ASSERT_TRUE(store->Sync().ok());
  }
  int flipped = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory.path())) {
    if (entry.path().extension() != ".blob") continue;
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(500'000);
    const char byte = static_cast<char>(file.get() ^ 1);
    file.seekp(500'000);
    file.put(byte);
    ++flipped;
  }
  ASSERT_EQ(flipped, 1);
  auto store = OpenRocksDbStore(directory.path(), 16 << 20).value();
  std::vector<uint8_t> read(bytes.size());
  EXPECT_TRUE(absl::IsDataLoss(store->ReadBulk("a", absl::MakeSpan(read))));
}

TEST(RocksDbStore, GoesOnBesideAFileThatCannotBeCompacted) {
  TemporaryDirectory directory;
  const auto bytes = Bytes(100, 7);
  {
    auto store = OpenRocksDbStore(directory.path(), 16 << 20).value();
    ASSERT_TRUE(store->WriteBulk("a", bytes).ok());
    ASSERT_TRUE(store->Sync().ok());
  }
  for (const auto& entry : std::filesystem::directory_iterator(directory.path())) {
    if (entry.path().extension() != ".sst") continue;
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(20);
    file.put('?');
  }
  auto store = OpenRocksDbStore(directory.path(), 16 << 20).value();
  for (const std::string key : {"b", "c"}) {
    ASSERT_TRUE(store->WriteBulk(key, bytes).ok());
    ASSERT_TRUE(store->Sync().ok());
    EXPECT_FALSE(store->Reclaim("").ok()) << "nothing is damaged, or nothing was compacted";
    const absl::Status committed = store->Commit({{{key, "2"}}});
    EXPECT_TRUE(committed.ok()) << committed;
  }
  std::vector<uint8_t> read(bytes.size());
  EXPECT_TRUE(store->ReadBulk("c", absl::MakeSpan(read)).ok());
}

uint64_t BytesOfBlobs(const std::string& directory) {
  uint64_t bytes = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory))
    if (entry.path().extension() == ".blob") bytes += entry.file_size();
  return bytes;
}

// The erased value is damaged: it is not read.
TEST(RocksDbStore, ReclaimsTheSpaceOfErasedValuesAlone) {
  TemporaryDirectory directory;
  const auto bytes = Bytes(3 << 20, 7);
  auto store = OpenRocksDbStore(directory.path(), 16 << 20).value();
  for (const std::string key : {"a/1", "b/1", "b/2"}) {
    ASSERT_TRUE(store->WriteBulk(key, bytes).ok());
    ASSERT_TRUE(store->Sync().ok());
  }
  EXPECT_GT(BytesOfBlobs(directory.path()), 9u << 20);
  for (const auto& entry : std::filesystem::directory_iterator(directory.path()))
    if (entry.path().extension() == ".blob")
      std::filesystem::resize_file(entry.path(), entry.file_size() - 1000);
  ASSERT_TRUE(store->Commit({.erase_bulk_prefixes = {"b/"}}).ok());
  ASSERT_TRUE(store->Reclaim("b/").ok());
  EXPECT_LT(BytesOfBlobs(directory.path()), 4u << 20);
  EXPECT_GT(BytesOfBlobs(directory.path()), 2u << 20);
}

TEST(DataDirectory, IsOfOneServerAndOneProcess) {
  TemporaryDirectory root;
  const std::string path = root.path() + "/data";
  {
    auto directory = DataDirectory::Open({path, "alpha"});
    ASSERT_TRUE(directory.ok()) << directory.status();
    EXPECT_EQ((*directory)->incarnation(), 1u);
    EXPECT_GT((*directory)->FreeBytes().value(), 0u);
    EXPECT_GT((*directory)->StoreBytes(), 0u);
    const absl::Status second = DataDirectory::Open({path, "alpha"}).status();
    EXPECT_TRUE(absl::IsUnavailable(second));
    EXPECT_THAT(
        std::string(second.message()),
        testing::AllOf(testing::HasSubstr(path), testing::HasSubstr(std::to_string(getpid()))));
  }
  const absl::Status other = DataDirectory::Open({path, "beta"}).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(other));
  EXPECT_THAT(std::string(other.message()),
              testing::AllOf(testing::HasSubstr("'alpha'"), testing::HasSubstr("'beta'")));
}

TEST(DataDirectory, NumbersItsProcesses) {
  TemporaryDirectory root;
  for (uint64_t process = 1; process < 4; ++process)
    EXPECT_EQ(DataDirectory::Open({root.path(), "alpha"}).value()->incarnation(), process);
}

TEST(DataDirectory, KeepsEpochsAndValues) {
  TemporaryDirectory root;
  {
    auto directory = DataDirectory::Open({root.path(), "alpha"}).value();
    EXPECT_EQ(directory->Epoch("job").value(), 0u);
    ASSERT_TRUE(directory->PersistEpoch("job", 7).ok());
    EXPECT_TRUE(absl::IsFailedPrecondition(directory->PersistEpoch("job", 6)));
    ASSERT_TRUE(directory->PutValue("record", "bytes").ok());
  }
  auto directory = DataDirectory::Open({root.path(), "alpha"}).value();
  EXPECT_EQ(directory->Epoch("job").value(), 7u);
  EXPECT_EQ(directory->GetValue("record").value(), "bytes");
  ASSERT_TRUE(directory->EraseValue("record").ok());
  EXPECT_TRUE(absl::IsNotFound(directory->GetValue("record").status()));
}

TEST(DataDirectory, RefusesAFolderOfSomethingElse) {
  TemporaryDirectory root;
  std::ofstream(root.path() + "/notes.txt") << "mine";
  const absl::Status status = DataDirectory::Open({root.path(), "alpha"}).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("notes.txt"));
}

}  // namespace
}  // namespace orlop::storage
