#include "server/memory/accountant.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "proto/status.h"

namespace orlop::server {
namespace {

constexpr uint64_t kMiB = 1 << 20;

TEST(Accountant, RefusesBeyondTheLimitNamingUseAndBytes) {
  Accountant accountant({10 * kMiB, 0});
  auto held = accountant.Reserve({Tier::kDram, "gpt", "weight"}, 8 * kMiB);
  ASSERT_TRUE(held.ok());
  const absl::Status refused =
      accountant.Reserve({Tier::kDram, "gpt", "staging"}, 3 * kMiB).status();
  EXPECT_TRUE(absl::IsResourceExhausted(refused));
  EXPECT_THAT(std::string(refused.message()),
              testing::AllOf(testing::HasSubstr("staging"), testing::HasSubstr("gpt"),
                             testing::HasSubstr(std::to_string(3 * kMiB)),
                             testing::HasSubstr(std::to_string(2 * kMiB)),
                             testing::HasSubstr(std::to_string(10 * kMiB))));
  EXPECT_EQ(DetailOf(refused).limit(), std::to_string(10 * kMiB));
  EXPECT_EQ(accountant.reserved_bytes(Tier::kDram), 8 * kMiB);
  EXPECT_TRUE(
      absl::IsResourceExhausted(accountant.Reserve({Tier::kNvme, "gpt", "exp_avg"}, 1).status()));
  EXPECT_TRUE(accountant.Reserve({Tier::kDram, "gpt", "staging"}, 2 * kMiB).ok());
}

TEST(Accountant, GrowsAReservationOrLeavesIt) {
  Accountant accountant({10 * kMiB, 0});
  const Use use{Tier::kDram, "gpt", "apply"};
  Reservation room;
  ASSERT_TRUE(accountant.Grow(&room, use, 2 * kMiB).ok());
  const BufferPtr held = room.Allocate(2 * kMiB).value();
  ASSERT_TRUE(accountant.Grow(&room, use, 6 * kMiB).ok());
  ASSERT_TRUE(accountant.Grow(&room, use, 3 * kMiB).ok());
  EXPECT_EQ(room.reserved_bytes(), 6 * kMiB);
  EXPECT_TRUE(absl::IsResourceExhausted(accountant.Grow(&room, use, 11 * kMiB)));
  EXPECT_EQ(accountant.reserved_bytes(Tier::kDram), 6 * kMiB);
  EXPECT_TRUE(room.Allocate(4 * kMiB).ok());
}

TEST(Accountant, ShrinksAReservationToWhatIsUsed) {
  Accountant accountant({0, 10 * kMiB});
  Reservation room;
  room.ShrinkTo(0);
  ASSERT_TRUE(accountant.Grow(&room, {Tier::kNvme, "gpt", "flush"}, 8 * kMiB).ok());
  ASSERT_TRUE(room.SetUsed(3 * kMiB).ok());
  room.ShrinkTo(9 * kMiB);
  EXPECT_EQ(room.reserved_bytes(), 8 * kMiB);
  room.ShrinkTo(5 * kMiB);
  EXPECT_EQ(room.reserved_bytes(), 5 * kMiB);
  room.ShrinkTo(kMiB);
  EXPECT_EQ(room.reserved_bytes(), 3 * kMiB);
  EXPECT_EQ(accountant.free_bytes(Tier::kNvme), 7 * kMiB);
}

TEST(Accountant, CountsUseAndPeakOfBuffers) {
  Accountant accountant({10 * kMiB, 0});
  auto room = accountant.Reserve({Tier::kDram, "", "lanes"}, 4 * kMiB).value();
  EXPECT_EQ(accountant.used_bytes(Tier::kDram), 0u);
  auto a = room.Allocate(kMiB + 1).value();
  EXPECT_EQ(accountant.used_bytes(Tier::kDram), kMiB + 4096);
  auto b = room.Allocate(100).value();
  EXPECT_EQ(accountant.used_bytes(Tier::kDram), kMiB + 4096 + 128);
  EXPECT_TRUE(absl::IsResourceExhausted(room.Allocate(3 * kMiB).status()));
  a.reset();
  EXPECT_EQ(accountant.used_bytes(Tier::kDram), 128u);
  EXPECT_EQ(accountant.peak_bytes(Tier::kDram), kMiB + 4096 + 128);
  const auto snapshot = accountant.Snapshot();
  ASSERT_EQ(snapshot.size(), 1u);
  EXPECT_EQ(snapshot[0].used_bytes, 128u);
  EXPECT_EQ(snapshot[0].peak_bytes, kMiB + 4096 + 128);
  EXPECT_EQ(snapshot[0].reserved_bytes, 4 * kMiB);
}

TEST(Accountant, ABufferOutlivesItsReservation) {
  Accountant accountant({10 * kMiB, 0});
  BufferPtr buffer;
  {
    auto room = accountant.Reserve({Tier::kDram, "gpt", "weight"}, 4 * kMiB).value();
    buffer = room.Allocate(kMiB).value();
  }
  EXPECT_EQ(accountant.reserved_bytes(Tier::kDram), kMiB);
  std::memset(buffer->data(), 1, buffer->size());
  buffer.reset();
  EXPECT_EQ(accountant.reserved_bytes(Tier::kDram), 0u);
  EXPECT_EQ(accountant.used_bytes(Tier::kDram), 0u);
}

TEST(Accountant, ForgetsTheUsesOfADeletedJobWithTheirLastBytes) {
  Accountant accountant({10 * kMiB, 0});
  const auto uses = [&] {
    std::vector<std::string> names;
    for (const UsedBytes& used : accountant.Snapshot())
      names.push_back(used.use.job + "/" + used.use.slot);
    return names;
  };
  auto other = accountant.Reserve({Tier::kDram, "other", "weight"}, kMiB).value();
  auto weight = accountant.Reserve({Tier::kDram, "gone", "weight"}, kMiB).value();
  auto again = accountant.Reserve({Tier::kDram, "gone", "staging"}, kMiB).value();
  { auto ended = accountant.Reserve({Tier::kDram, "gone", "gradient"}, kMiB).value(); }
  BufferPtr sent = weight.Allocate(kMiB).value();
  EXPECT_THAT(uses(), ::testing::ElementsAre("gone/gradient", "gone/staging", "gone/weight",
                                             "other/weight"));
  accountant.Forget("gone");
  EXPECT_THAT(uses(), ::testing::ElementsAre("gone/staging", "gone/weight", "other/weight"));
  weight = Reservation();  // the buffer is still being sent
  EXPECT_THAT(uses(), ::testing::ElementsAre("gone/staging", "gone/weight", "other/weight"));
  sent.reset();
  EXPECT_THAT(uses(), ::testing::ElementsAre("gone/staging", "other/weight"));
  ASSERT_TRUE(accountant.Grow(&again, {Tier::kDram, "gone", "staging"}, 2 * kMiB).ok());
  again = Reservation();  // it had grown after Forget, as for a new job of that name
  EXPECT_THAT(uses(), ::testing::ElementsAre("gone/staging", "other/weight"));
}

TEST(Accountant, CountsBytesOfOthersAndTrims) {
  Accountant accountant({10 * kMiB, 0});
  auto room = accountant.Reserve({Tier::kDram, "", "rocksdb"}, 4 * kMiB).value();
  ASSERT_TRUE(room.SetUsed(3 * kMiB).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(room.SetUsed(5 * kMiB)));
  ASSERT_TRUE(room.SetUsed(kMiB).ok());
  room.Trim();
  EXPECT_EQ(accountant.reserved_bytes(Tier::kDram), kMiB);
  room = Reservation();
  EXPECT_EQ(accountant.reserved_bytes(Tier::kDram), 0u);
  EXPECT_EQ(accountant.used_bytes(Tier::kDram), 0u);
}

TEST(Accountant, NeverPassesItsLimitUnderThreads) {
  Accountant accountant({16 * kMiB, 0});
  std::vector<std::thread> threads;
  threads.reserve(4);
  std::atomic<int> granted = 0;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 500; ++i) {
        auto room = accountant.Reserve({Tier::kDram, "", "lanes"}, 6 * kMiB);
        if (!room.ok()) continue;
        ++granted;
        auto buffer = room->Allocate(6 * kMiB);
        EXPECT_TRUE(buffer.ok());
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(granted, 0);
  EXPECT_LE(accountant.peak_bytes(Tier::kDram), 12 * kMiB);
  EXPECT_EQ(accountant.used_bytes(Tier::kDram), 0u);
  EXPECT_EQ(accountant.reserved_bytes(Tier::kDram), 0u);
}

uint64_t AnonymousBytes() {
  std::ifstream file("/proc/self/smaps_rollup");
  for (std::string word; file >> word;)
    if (word == "Anonymous:") {
      uint64_t kilobytes;
      file >> kilobytes;
      return kilobytes << 10;
    }
  return 0;
}

TEST(Accountant, ReportsWhatTheSystemReports) {
#ifdef ORLOP_SANITIZED
  GTEST_SKIP() << "sanitizers keep shadow memory of their own";
#endif
  Accountant accountant({1 << 30, 0});
  const uint64_t before = AnonymousBytes();
  ASSERT_GT(before, 0u);
  auto room = accountant.Reserve({Tier::kDram, "", "lanes"}, 256 * kMiB).value();
  std::vector<BufferPtr> buffers;
  for (uint64_t i = 0; i < 25; ++i) {
    buffers.push_back(room.Allocate(8 * kMiB + 4096 * i).value());
    std::memset(buffers.back()->data(), 1, buffers.back()->size());
  }
  const double used = accountant.used_bytes(Tier::kDram);
  EXPECT_NEAR(AnonymousBytes() - before, used, 0.03 * used);
  buffers.clear();
  EXPECT_EQ(accountant.idle_bytes(), used);
  EXPECT_NEAR(AnonymousBytes() - before, used, 0.03 * used);
  accountant.GiveBackIdle();
  EXPECT_EQ(accountant.idle_bytes(), used) << "two seconds have not passed";
  std::this_thread::sleep_for(std::chrono::milliseconds(2100));
  accountant.GiveBackIdle();
  EXPECT_EQ(accountant.idle_bytes(), 0u);
  EXPECT_LT(AnonymousBytes() - before, 0.03 * used);
}

TEST(Accountant, ABufferTakesThePagesOfAnEarlierOne) {
  Accountant accountant({10 * kMiB, 0});
  auto room = accountant.Reserve({Tier::kDram, "", "lanes"}, 8 * kMiB).value();
  BufferPtr first = room.Allocate(kMiB).value();
  const uint8_t* pages = first->data();
  std::memset(first->data(), 1, first->size());
  first.reset();
  EXPECT_EQ(accountant.used_bytes(Tier::kDram), 0u);
  EXPECT_EQ(accountant.idle_bytes(), kMiB);
  auto other = accountant.Reserve({Tier::kDram, "gpt", "weight"}, kMiB).value();
  const BufferPtr second = other.Allocate(kMiB - 100).value();  // of as many pages
  EXPECT_EQ(second->data(), pages);
  EXPECT_EQ(accountant.idle_bytes(), 0u);
  EXPECT_THAT(second->bytes(), testing::Each(0)) << "bytes of another job";
}

TEST(Accountant, IdleBytesLeaveRoomForWhatIsUsed) {
  Accountant accountant({10 * kMiB, 0});
  auto room = accountant.Reserve({Tier::kDram, "", "lanes"}, 10 * kMiB).value();
  {
    const BufferPtr freed_last = room.Allocate(3 * kMiB).value();
    const BufferPtr freed_first = room.Allocate(4 * kMiB).value();
    const BufferPtr small = room.Allocate(100).value();  // comes from malloc
  }
  EXPECT_EQ(accountant.idle_bytes(), 7 * kMiB);
  const BufferPtr third = room.Allocate(2 * kMiB).value();
  EXPECT_EQ(accountant.idle_bytes(), 7 * kMiB);
  ASSERT_TRUE(room.SetUsed(2 * kMiB).ok());  // bytes that are no buffer's count as well
  EXPECT_EQ(accountant.idle_bytes(), 3 * kMiB);
}

TEST(Accountant, UsedAndIdleBytesStayWithinTheLimitUnderThreads) {
  constexpr uint64_t kLimit = 8 * kMiB;
  Accountant accountant({kLimit, 0});
  std::atomic<bool> done = false;
  std::thread looks([&] {
    while (!done) {
      // Idle first: bytes that change hands between the two calls are counted once or not at all.
      const uint64_t idle = accountant.idle_bytes();
      EXPECT_LE(idle, kLimit);
      accountant.GiveBackIdle();
    }
  });
  std::vector<std::thread> threads;
  threads.reserve(3);
  for (uint32_t t = 0; t < 3; ++t)
    threads.emplace_back([&accountant, t] {
      std::minstd_rand random(t);
      auto room = accountant.Reserve({Tier::kDram, "", "lanes"}, 2 * kMiB).value();
      for (int i = 0; i < 2000; ++i) {
        const uint64_t bytes = (5 + random() % 100) * 4096 * 5;
        const auto buffer = room.Allocate(bytes);
        if (!buffer.ok()) continue;
        ASSERT_EQ((*buffer)->data()[bytes / 2], 0);
        std::memset((*buffer)->data(), 0xa5, bytes);
      }
    });
  for (std::thread& thread : threads) thread.join();
  done = true;
  looks.join();
  EXPECT_EQ(accountant.used_bytes(Tier::kDram), 0u);
  EXPECT_LE(accountant.idle_bytes(), kLimit);
}

}  // namespace
}  // namespace orlop::server
