#include "storage/marked_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <ios>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "storage/store.h"
#include "storage/testing/faulty_store.h"
#include "storage/testing/memory_store.h"

namespace orlop::storage {
namespace {

class Marked : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "orlop_mark_XXXXXX").string();
    directory_ = mkdtemp(pattern.data());
  }
  void TearDown() override {
    store_.reset();
    std::filesystem::remove_all(directory_);
  }
  std::string path() const { return directory_ + "/VALUES"; }

  // Opens the mark beside a store with these values, and nothing else.
  absl::Status Open(const std::vector<std::pair<std::string, std::string>>& values) {
    auto real = NewMemoryStore();
    EXPECT_TRUE(real->Commit({values}).ok());
    auto faulty = std::make_unique<FaultyStore>(std::move(real));
    faulty_ = faulty.get();
    auto opened = MarkedStore::Open(std::move(faulty), path());
    if (!opened.ok()) return opened.status();
    store_ = *std::move(opened);
    return absl::OkStatus();
  }
  bool Loses(const std::vector<std::pair<std::string, std::string>>& values) {
    const absl::Status opened = Open(values);
    EXPECT_TRUE(opened.ok()) << opened;
    return store_->has_lost_writes();
  }
  void Flip(int64_t at) const {
    std::fstream file(path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(at);
    const char byte = static_cast<char>(file.get() ^ 1);
    file.seekp(at);
    file.put(byte);
  }

  std::string directory_;
  std::unique_ptr<MarkedStore> store_;
  FaultyStore* faulty_ = nullptr;  // below store_
};

TEST_F(Marked, KnowsTheValuesOfTheLastProcess) {
  EXPECT_FALSE(Loses({{"a", "1"}})) << "there was no file";
  ASSERT_TRUE(store_->Commit({{{"b", "2"}, {"spill/x", "9"}}, {"a"}}).ok());
  ASSERT_TRUE(store_->Commit({{{"b", "3"}, {"c", "4"}}, {}}).ok());
  EXPECT_FALSE(Loses({{"b", "3"}, {"c", "4"}}));
  EXPECT_FALSE(Loses({{"b", "3"}, {"c", "4"}, {"spill/y", "8"}}));
  EXPECT_EQ(store_->Get("c").value(), "4");
}

TEST_F(Marked, FindsWritesThatAreGone) {
  for (const auto& values : std::vector<std::vector<std::pair<std::string, std::string>>>{
           {}, {{"a", "1"}}, {{"b", "2"}}, {{"a", "1"}, {"b", "3"}}, {{"a", "2"}, {"b", "1"}}}) {
    std::filesystem::remove(path());
    ASSERT_FALSE(Loses({}));
    ASSERT_TRUE(store_->Commit({{{"a", "1"}}}).ok());
    ASSERT_TRUE(store_->Commit({{{"b", "2"}}}).ok());
    EXPECT_TRUE(Loses(values));
  }
}

TEST_F(Marked, StaysLostUntilItIsForgiven) {
  ASSERT_FALSE(Loses({}));
  ASSERT_TRUE(store_->Commit({{{"a", "1"}}}).ok());
  EXPECT_TRUE(Loses({}));
  ASSERT_TRUE(store_->Commit({{{"b", "2"}}}).ok());
  EXPECT_TRUE(Loses({{"b", "2"}}));
  ASSERT_TRUE(store_->Forgive().ok());
  EXPECT_TRUE(store_->has_lost_writes()) << "this process has still to act on it";
  EXPECT_FALSE(Loses({{"b", "2"}}));
}

// The process may end before or after the store has taken a write.
TEST_F(Marked, AWriteThatWasCutOffMayBeThereOrNot) {
  for (const bool is_there : {false, true}) {
    std::filesystem::remove(path());
    ASSERT_FALSE(Loses({{"a", "1"}}));
    faulty_->FailWritesAfter(0, absl::DataLossError("the process ends here"));
    EXPECT_FALSE(store_->Commit({{{"a", "2"}}}).ok());
    EXPECT_FALSE(Loses({{"a", is_there ? "2" : "1"}}));
  }
}

TEST_F(Marked, SurvivesAFlippedBitInAnyRecord) {
  for (int record = 0; record < 4; ++record) {
    std::filesystem::remove(path());
    ASSERT_FALSE(Loses({}));
    ASSERT_TRUE(store_->Commit({{{"a", "1"}}}).ok());
    Flip(512 * record + 30);
    EXPECT_FALSE(Loses({{"a", "1"}})) << record;
  }
}

TEST_F(Marked, RefusesAFileThatIsDamagedByName) {
  ASSERT_FALSE(Loses({}));
  store_.reset();
  std::filesystem::resize_file(path(), 20);
  const absl::Status refused = Open({});
  EXPECT_TRUE(absl::IsDataLoss(refused)) << refused;
  EXPECT_THAT(std::string(refused.message()),
              testing::AllOf(testing::HasSubstr(path()), testing::HasSubstr("remove it")));
}

}  // namespace
}  // namespace orlop::storage
