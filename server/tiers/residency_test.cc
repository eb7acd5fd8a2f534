// Tests of SlotHome (the slots of one shard), of Tiers, and of Residency, which chooses the slots
// to spill.
#include "server/tiers/residency.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "orlop/v1/types.pb.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/tiers/slot_home.h"
#include "server/tiers/tier.h"
#include "storage/testing/faulty_store.h"
#include "storage/testing/memory_store.h"

namespace orlop::server {
namespace {

constexpr uint64_t kCount = 64 << 10;  // elements of a shard
constexpr SlotFormat kWeight = {v1::DTYPE_BF16}, kCodes = {v1::DTYPE_U8, 1, 127};

struct World {
  explicit World(size_t shard_count, uint64_t dram_bytes = 16 << 20)
      : accountant({dram_bytes, 64 << 20}), disk(storage::NewMemoryStore()) {
    tiers = Tiers::Create(&accountant, &disk).value();
    std::vector<SlotHome*> all;
    for (size_t i = 0; i < shard_count; ++i) {
      const auto id = static_cast<int32_t>(i);
      homes.push_back(std::make_unique<SlotHome>(
          tiers.get(), SlotKey{"job", id, Slot::kWeight, "w"}, "tensor 'w'", kCount));
      all.push_back(homes.back().get());
    }
    residency = std::make_unique<Residency>("job", tiers.get(), all);
    for (SlotHome* home : all) {
      EXPECT_TRUE(residency->Place(home, Slot::kWeight, kWeight).ok());
      EXPECT_TRUE(residency->Place(home, Slot::kExpAvg, kCodes).ok());
    }
  }
  // Sets every byte of a slot, as version 0.
  void Fill(SlotHome* home, Slot slot, uint8_t byte) {
    const SlotHold hold(home);
    auto buffer = home->Replace(hold, slot);
    ASSERT_TRUE(buffer.ok()) << buffer.status();
    std::memset((*buffer)->data(), byte, (*buffer)->size());
    ASSERT_TRUE(home->Keep(hold, slot, 0, {*std::move(buffer), std::nullopt}).ok());
  }
  // Returns the first byte of a slot, in memory or on disk; -1 if the slot was never written.
  int FirstByte(SlotHome* home, Slot slot) {
    const SlotHold hold(home);
    const auto bytes = home->Read(hold, slot);
    EXPECT_TRUE(bytes.ok()) << bytes.status();
    return *bytes ? (*bytes)->bytes()[0] : -1;
  }
  // Returns whether the slot is on disk, for each shard.
  std::vector<bool> Spilled(Slot slot) {
    std::vector<bool> spilled;
    spilled.reserve(homes.size());
    for (const auto& home : homes) spilled.push_back(home->tier(slot) == Tier::kNvme);
    return spilled;
  }

  Accountant accountant;
  storage::FaultyStore disk;
  std::unique_ptr<Tiers> tiers;
  std::vector<std::unique_ptr<SlotHome>> homes;
  std::unique_ptr<Residency> residency;
};

const absl::Status kFull = absl::ResourceExhaustedError("no space left on device");

TEST(SlotHome, SpillsWhatNobodyUsesAndReadsItBack) {
  World world(1);
  SlotHome* home = world.homes[0].get();
  world.Fill(home, Slot::kExpAvg, 42);
  {
    const SlotHold hold(home);
    EXPECT_EQ(home->Spill(Slot::kExpAvg).value(), 0u);
    const BufferPtr reader = home->data(hold, Slot::kExpAvg);
    EXPECT_TRUE(home->is_shared(hold, Slot::kExpAvg));
  }
  BufferPtr reader;
  home->Inspect([&](const SlotHome::View& view) {
    reader = view.slots[SlotIndex(Slot::kExpAvg)].bytes.data;
  });
  EXPECT_EQ(home->Spill(Slot::kExpAvg).value(), 0u);
  reader.reset();
  EXPECT_EQ(home->Spill(Slot::kExpAvg).value(), Buffer::Footprint(kCount));
  EXPECT_EQ(home->tier(Slot::kExpAvg), Tier::kNvme);
  EXPECT_EQ(world.FirstByte(home, Slot::kExpAvg), 42);
  EXPECT_EQ(home->Spill(Slot::kWeight).value(), Buffer::Footprint(2 * kCount));  // without bytes
  EXPECT_EQ(world.FirstByte(home, Slot::kWeight), -1);
  EXPECT_EQ(world.accountant.used_bytes(Tier::kNvme), kCount);
}

TEST(SlotHome, BringsInitialBytesAndSpilledOnes) {
  World world(3);
  SlotHome* home = world.homes[2].get();
  {
    const SlotHold hold(home);
    const auto initial = world.residency->Bring(home, hold, Slot::kExpAvg);
    ASSERT_TRUE(initial.ok()) << initial.status();
    EXPECT_EQ((*initial)->bytes()[kCount - 1], 127);
    EXPECT_FALSE(home->has_contents(hold, Slot::kExpAvg));
  }
  world.Fill(home, Slot::kExpAvg, 9);
  ASSERT_GT(world.residency->SpillCold(1), 0u);
  ASSERT_EQ(home->tier(Slot::kExpAvg), Tier::kNvme);
  const SlotHold hold(home);
  const auto lease = world.residency->Lease(*home);
  ASSERT_TRUE(lease.ok()) << lease.status();
  const auto brought = world.residency->Bring(home, hold, Slot::kExpAvg);
  ASSERT_TRUE(brought.ok()) << brought.status();
  EXPECT_EQ((*brought)->bytes()[kCount - 1], 9);
}

// If a write fails, the slot has its new bytes in memory. They are written once the disk works
// again.
TEST(SlotHome, KeepsInMemoryWhatTheDiskRefuses) {
  World world(1);
  SlotHome* home = world.homes[0].get();
  world.Fill(home, Slot::kExpAvg, 1);
  ASSERT_TRUE(home->Spill(Slot::kExpAvg).ok());
  world.disk.FailWritesAfter(0, kFull);
  BufferPtr next = home->NewMessage(kCount).value();
  std::memset(next->data(), 2, kCount);
  EXPECT_TRUE(absl::IsResourceExhausted(
      home->Keep(SlotHold(home), Slot::kExpAvg, 1, {std::move(next), std::nullopt})));
  EXPECT_EQ(world.FirstByte(home, Slot::kExpAvg), 2);
  home->WriteBack();
  EXPECT_NE(home->data(SlotHold(home), Slot::kExpAvg), nullptr);
  world.disk.Heal();
  home->WriteBack();
  EXPECT_EQ(home->data(SlotHold(home), Slot::kExpAvg), nullptr);
  EXPECT_EQ(world.FirstByte(home, Slot::kExpAvg), 2);
  EXPECT_EQ(world.disk.ScanBulk("spill/").value().size(), 1u);
}

TEST(Tiers, DiscardedValuesGoWithTheNextSpill) {
  World world(1);
  const SlotKey key = world.homes[0]->Key(Slot::kExpAvg);
  const std::vector<uint8_t> bytes(1000, 3);
  const SpilledSlot first = world.tiers->Spill(key, 0, bytes, nullptr).value();
  world.disk.FailWritesAfter(0, kFull);
  world.tiers->Discard(key, first);  // touches no disk
  EXPECT_FALSE(world.tiers->Spill(key, 1, bytes, nullptr).ok());
  world.disk.Heal();
  EXPECT_EQ(world.disk.ScanBulk("spill/").value().size(), 1u);
  EXPECT_TRUE(world.tiers->Spill(key, 1, bytes, nullptr).ok());
  EXPECT_EQ(world.disk.ScanBulk("spill/").value().size(), 1u);
}

TEST(Residency, SpillsWhatWasUsedLastAndWeightsAtTheEnd) {
  World world(4);
  for (const auto& home : world.homes) {
    world.Fill(home.get(), Slot::kWeight, 1);
    world.Fill(home.get(), Slot::kExpAvg, 2);
  }
  for (int32_t shard : {2, 0, 3, 1}) world.residency->Used(shard, 5);
  const uint64_t window = Buffer::Footprint(2 * kCount) + Buffer::Footprint(kCount);
  // The first spill also frees memory for the window, so all states of all shards are spilled.
  EXPECT_GE(world.residency->SpillCold(kCount / 2), kCount / 2);
  EXPECT_EQ(world.Spilled(Slot::kExpAvg), std::vector<bool>({true, true, true, true}));
  EXPECT_EQ(world.Spilled(Slot::kWeight), std::vector<bool>({false, false, false, false}));
  EXPECT_EQ(world.residency->SpillCold(1), Buffer::Footprint(2 * kCount));
  EXPECT_EQ(world.Spilled(Slot::kWeight), std::vector<bool>({false, true, false, false}));
  EXPECT_GE(world.accountant.reserved_bytes(Tier::kDram), window);
  for (const auto& home : world.homes) {
    EXPECT_EQ(world.FirstByte(home.get(), Slot::kWeight), 1);
    EXPECT_EQ(world.FirstByte(home.get(), Slot::kExpAvg), 2);
  }
}

// A new slot that does not fit into memory is placed on disk. Slots of its own job are spilled for
// the window only.
TEST(Residency, PlacesASlotWithoutMovingItsOwn) {
  World world(3, 640 << 10);  // 576 KiB are placed
  for (const auto& home : world.homes) world.Fill(home.get(), Slot::kExpAvg, 2);
  const SlotFormat large = {v1::DTYPE_F32};
  ASSERT_TRUE(world.residency->Place(world.homes[0].get(), Slot::kExpAvgSq, large).ok());
  EXPECT_EQ(world.homes[0]->tier(Slot::kExpAvgSq), Tier::kNvme);
  EXPECT_LE(world.accountant.reserved_bytes(Tier::kDram), uint64_t{640 << 10});
}

// ---- Back into memory ----

TEST(SlotHome, BringsASlotBackIfItFitsAndNobodyHoldsIt) {
  World world(1);
  SlotHome* home = world.homes[0].get();
  world.Fill(home, Slot::kExpAvg, 42);
  EXPECT_EQ(home->BringBack(Slot::kExpAvg, UINT64_MAX).value(), 0u);  // it is in memory
  ASSERT_GT(home->Spill(Slot::kExpAvg).value(), 0u);
  ASSERT_GT(home->Spill(Slot::kWeight).value(), 0u);  // without bytes
  {
    const SlotHold hold(home);
    EXPECT_EQ(home->BringBack(Slot::kExpAvg, UINT64_MAX).value(), 0u);
  }
  const uint64_t bytes = Buffer::Footprint(kCount);
  EXPECT_EQ(home->BringBack(Slot::kExpAvg, bytes - 1).value(), 0u);
  EXPECT_EQ(home->BringBack(Slot::kExpAvg, bytes).value(), bytes);
  EXPECT_EQ(home->BringBack(Slot::kWeight, UINT64_MAX).value(), Buffer::Footprint(2 * kCount));
  EXPECT_EQ(home->SpilledFootprintBytes(), 0u);
  EXPECT_EQ(world.FirstByte(home, Slot::kExpAvg), 42);
  EXPECT_EQ(world.FirstByte(home, Slot::kWeight), -1);
  EXPECT_EQ(world.accountant.reserved_bytes(Tier::kNvme), 0u);
  EXPECT_EQ(world.disk.Scan("spill/").value().size(), 0u);
}

TEST(Tiers, BringsSlotsBackFromHalfTheMemoryFreeToASixteenth) {
  World world(40, 8 << 20);  // 40 shards of 192 KiB
  const uint64_t limit = world.accountant.limit_bytes(Tier::kDram);
  for (const auto& home : world.homes) world.Fill(home.get(), Slot::kExpAvg, 7);
  const auto now = std::chrono::steady_clock::now();
  const Use guest{Tier::kDram, "", "guest"};
  const uint64_t all = world.accountant.free_bytes(Tier::kDram) + limit / 3;
  ASSERT_TRUE(world.tiers->Reserve(guest, all).ok());  // and gives it back at once
  ASSERT_LT(world.accountant.free_bytes(Tier::kDram), limit / 2);
  EXPECT_FALSE(world.tiers->BringBack(now));  // less than half is free, and a spill was just made
  ASSERT_GT(world.residency->SpillCold(limit / 3), 0u);
  ASSERT_GE(world.accountant.free_bytes(Tier::kDram), limit / 2);
  while (world.tiers->BringBack()) {
  }
  const uint64_t free = world.accountant.free_bytes(Tier::kDram);
  EXPECT_GE(free, limit / 16);
  EXPECT_LT(free, limit / 16 + Buffer::Footprint(2 * kCount));
  EXPECT_FALSE(world.tiers->BringBack(now));
  for (const auto& home : world.homes) EXPECT_EQ(world.FirstByte(home.get(), Slot::kExpAvg), 7);
}

TEST(Tiers, BringsSlotsBackOnceNothingHasSpilledForAWhile) {
  World world(40, 8 << 20);
  const uint64_t limit = world.accountant.limit_bytes(Tier::kDram);
  const uint64_t all = world.accountant.free_bytes(Tier::kDram) + limit / 4;
  ASSERT_TRUE(world.tiers->Reserve({Tier::kDram, "", "guest"}, all).ok());
  const auto now = std::chrono::steady_clock::now();
  EXPECT_FALSE(world.tiers->BringBack(now + std::chrono::seconds(9)));
  EXPECT_TRUE(world.tiers->BringBack(now + std::chrono::seconds(11)));
  while (world.tiers->BringBack(now)) {  // goes on, though it is not calm by this clock
  }
  EXPECT_LT(world.accountant.free_bytes(Tier::kDram), limit / 16 + Buffer::Footprint(2 * kCount));
}

// Spills or brings what it is asked for, and notes that it was asked.
struct FakeJob : Spillable {
  FakeJob(const std::string& name, int last_use, std::vector<std::string>* asked)
      : rank{std::chrono::steady_clock::time_point(std::chrono::seconds(last_use)), name},
        asked(asked) {}
  uint64_t SpillCold(uint64_t) override { return asked->push_back(rank.second), 0; }
  uint64_t BringBack(uint64_t) override { return asked->push_back(rank.second), 0; }
  std::pair<std::chrono::steady_clock::time_point, std::string> Rank() const override {
    return rank;
  }
  std::pair<std::chrono::steady_clock::time_point, std::string> rank;
  std::vector<std::string>* asked;
};

TEST(Tiers, TheJobThatWasUsedLongestAgoSpillsFirst) {
  Accountant accountant({1 << 20, 1 << 20});
  storage::FaultyStore disk(storage::NewMemoryStore());
  const auto tiers = Tiers::Create(&accountant, &disk).value();
  std::vector<std::string> asked;
  FakeJob busy("a", 9, &asked), idle("z", 1, &asked), twin("b", 9, &asked);
  for (FakeJob* job : {&busy, &twin, &idle}) tiers->Register(job);
  EXPECT_FALSE(tiers->BringBack());  // they have nothing to bring
  EXPECT_THAT(asked, testing::ElementsAre("b", "a", "z"));
  asked.clear();
  const auto full = accountant.Reserve({Tier::kDram, "", "test"}, 1 << 20);
  EXPECT_FALSE(tiers->Reserve({Tier::kDram, "", "more"}, 1).ok());
  EXPECT_THAT(asked, testing::ElementsAre("z", "a", "b"));
  for (FakeJob* job : {&busy, &twin, &idle}) tiers->Unregister(job);
}

}  // namespace
}  // namespace orlop::server
