#include "server/durability/flush_room.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/durability/flush.h"
#include "server/shards/shard_store.h"
#include "server/shards/testing/shard_fixture.h"
#include "server/tiers/tier.h"
#include "storage/store.h"
#include "storage/testing/memory_store.h"

namespace orlop::server {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr uint64_t kDiskBytes = 100 * kMiB;

// The room of a job without shards on a disk of 100 MiB, and of another job beside it.
class Room : public testing::Test {
 protected:
  Room() { world_.free_disk_bytes = kDiskBytes + Tiers::kDiskMarginBytes; }

  void Write(int64_t step) {
    ASSERT_TRUE(WriteFlush(disk_.get(), {"job", step, "", "", ""}, false, shards_.get()).ok());
    room_.Count();
    world_.free_disk_bytes -= 30 * kMiB;
  }
  std::vector<int64_t> Steps() const {
    const std::vector<FlushInfo> flushes = ListFlushes(*disk_, "job").value();
    std::vector<int64_t> steps;
    steps.reserve(flushes.size());
    for (const FlushInfo& flush : flushes) steps.push_back(flush.step);
    return steps;
  }
  UsedBytes Shown() const {
    for (const UsedBytes& used : world_.accountant.Snapshot())
      if (used.use == Use{Tier::kNvme, "job", "flush"}) return used;
    return {};
  }

  World world_{64 * kMiB, kDiskBytes};
  std::unique_ptr<storage::Store> disk_ = storage::NewMemoryStore();
  std::unique_ptr<ShardStore> shards_ = NewStore(&world_, Layout({}, 5120));
  FlushRoom room_{"job", world_.tiers.get(), disk_.get()};
  FlushRoom other_{"other", world_.tiers.get(), disk_.get()};
};

TEST_F(Room, IsReservedForTwoFlushesAndShown) {
  ASSERT_TRUE(room_.Grow(30 * kMiB).ok());
  EXPECT_EQ(Shown().reserved_bytes, 60 * kMiB);
  EXPECT_EQ(Shown().used_bytes, 0u);
  Write(1);
  EXPECT_EQ(Shown().used_bytes, 30 * kMiB);
  ASSERT_TRUE(room_.Grow(20 * kMiB).ok());
  EXPECT_EQ(Shown().reserved_bytes, 60 * kMiB) << "it does not shrink by itself";
  room_.ShrinkTo(20 * kMiB);
  EXPECT_EQ(Shown().reserved_bytes, 40 * kMiB);
  EXPECT_EQ(room_.missing_bytes(), 0u);
}

TEST_F(Room, IsRefusedNamingTheBytes) {
  ASSERT_TRUE(other_.Grow(30 * kMiB).ok());
  const absl::Status refused = room_.Grow(25 * kMiB);
  EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  EXPECT_EQ(DetailOf(refused).reason(), v1::ErrorDetail::BUDGET);
  EXPECT_EQ(DetailOf(refused).actual(), std::to_string(50 * kMiB));
  EXPECT_EQ(DetailOf(refused).limit(), std::to_string(40 * kMiB));
  EXPECT_THAT(std::string(refused.message()),
              AllOf(HasSubstr("'job'"), HasSubstr(std::to_string(50 * kMiB)),
                    HasSubstr(std::to_string(40 * kMiB)), HasSubstr("larger disk")));
  EXPECT_EQ(Shown().reserved_bytes, 0u);
  EXPECT_TRUE(room_.Grow(20 * kMiB).ok());
}

TEST_F(Room, IsRefusedIfOthersHaveFilledTheDisk) {
  ASSERT_TRUE(other_.Grow(10 * kMiB).ok());
  world_.free_disk_bytes = 59 * kMiB + Tiers::kDiskMarginBytes;
  const absl::Status refused = room_.Grow(20 * kMiB);
  EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  EXPECT_EQ(DetailOf(refused).limit(), std::to_string(39 * kMiB));
  world_.free_disk_bytes = 60 * kMiB + Tiers::kDiskMarginBytes;
  EXPECT_TRUE(room_.Grow(20 * kMiB).ok());
}

TEST_F(Room, OfAStoredJobIsTakenAsFarAsTheDiskHasIt) {
  Write(1);
  ASSERT_TRUE(other_.Grow(30 * kMiB).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(room_.Take(30 * kMiB)));
  EXPECT_EQ(Shown().reserved_bytes, 40 * kMiB);
  EXPECT_EQ(Shown().used_bytes, 30 * kMiB);
  EXPECT_EQ(room_.missing_bytes(), 20 * kMiB);
  other_.ShrinkTo(0);
  EXPECT_TRUE(room_.Take(30 * kMiB).ok());
  EXPECT_EQ(room_.missing_bytes(), 0u);
}

TEST_F(Room, AThirdFlushIsKeptWhereThereIsRoom) {
  ASSERT_TRUE(room_.Grow(30 * kMiB).ok());
  Write(1);
  Write(2);
  bool has_erased = false;
  EXPECT_TRUE(room_.MakeRoom({2}, false, &has_erased).ok());
  EXPECT_FALSE(has_erased);
  EXPECT_THAT(Steps(), ElementsAre(2, 1));
}

TEST_F(Room, FlushesThatMayGoAreErasedBeforeTheNextIfTheDiskIsShort) {
  ASSERT_TRUE(room_.Grow(30 * kMiB).ok());
  Write(1);
  Write(2);
  world_.free_disk_bytes = 35 * kMiB;
  bool has_erased = false;
  EXPECT_TRUE(room_.MakeRoom({2}, false, &has_erased).ok());
  EXPECT_TRUE(has_erased);
  EXPECT_THAT(Steps(), ElementsAre(2));
  EXPECT_EQ(Shown().used_bytes, 30 * kMiB);
}

TEST_F(Room, OfOthersIsNotTakenForAThirdFlush) {
  ASSERT_TRUE(room_.Grow(30 * kMiB).ok());
  ASSERT_TRUE(other_.Grow(10 * kMiB).ok());
  Write(1);
  Write(2);
  bool has_erased = false;
  EXPECT_TRUE(room_.MakeRoom({2}, false, &has_erased).ok());
  EXPECT_TRUE(has_erased) << "40 MiB are on the disk, of which 20 are the other job's";
}

TEST_F(Room, AFlushThatFindsNoRoomLosesNoneThatIsNeeded) {
  ASSERT_TRUE(room_.Grow(30 * kMiB).ok());
  Write(1);
  Write(2);
  world_.free_disk_bytes = 5 * kMiB;
  bool has_erased = false;
  const absl::Status refused = room_.MakeRoom({2}, false, &has_erased);
  EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  EXPECT_THAT(std::string(refused.message()),
              AllOf(HasSubstr("'job'"), HasSubstr(std::to_string(30 * kMiB)),
                    HasSubstr(std::to_string(5 * kMiB)), HasSubstr("no space left")));
  EXPECT_THAT(Steps(), ElementsAre(2));
}

}  // namespace
}  // namespace orlop::server
