#include "server/memory/buffer_pool.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace orlop::server {
namespace {

using testing::ElementsAre;

constexpr uint64_t kPage = 4096;

std::vector<uint64_t> Sizes(const std::vector<Pages>& list) {
  std::vector<uint64_t> sizes;
  sizes.reserve(list.size());
  for (const Pages& pages : list) sizes.push_back(pages.bytes / kPage);
  Unmap(list);
  return sizes;
}

TEST(BufferPool, GivesTheLastPagesOfASize) {
  BufferPool pool;
  const Pages first = MapPages(2 * kPage), second = MapPages(2 * kPage),
              other = MapPages(3 * kPage);
  pool.Give(first, 1);
  pool.Give(second, 2);
  pool.Give(other, 3);
  EXPECT_EQ(pool.idle_bytes(), 7 * kPage);
  EXPECT_EQ(pool.Take(kPage).data, nullptr);
  const Pages taken = pool.Take(2 * kPage);
  EXPECT_EQ(taken.data, second.data) << "the last one is warm in the caches";
  std::memset(taken.data, 1, taken.bytes);  // a poisoned page would be reported
  EXPECT_EQ(pool.Take(2 * kPage).data, first.data);
  EXPECT_EQ(pool.Take(2 * kPage).data, nullptr);
  EXPECT_EQ(pool.idle_bytes(), 3 * kPage);
  Unmap({first, second});
}

TEST(BufferPool, RemovesTheOldestFirst) {
  BufferPool pool;
  for (const uint64_t pages : {3, 1, 2, 1, 4}) pool.Give(MapPages(pages * kPage), 0);
  EXPECT_THAT(Sizes(pool.ShrinkTo(11 * kPage)), ElementsAre());
  EXPECT_THAT(Sizes(pool.ShrinkTo(8 * kPage)), ElementsAre(3));
  EXPECT_THAT(Sizes(pool.ShrinkTo(6 * kPage)), ElementsAre(1, 2));
  EXPECT_EQ(pool.idle_bytes(), 5 * kPage);
  EXPECT_THAT(Sizes(pool.ShrinkTo(0)), ElementsAre(1, 4));
}

TEST(BufferPool, PagesRestForATime) {
  BufferPool pool;
  pool.Give(MapPages(1 * kPage), 100);
  pool.Give(MapPages(2 * kPage), 200);
  pool.Give(MapPages(3 * kPage), 300);
  EXPECT_THAT(Sizes(pool.Rest(100)), ElementsAre());
  EXPECT_THAT(Sizes(pool.Rest(201)), ElementsAre(1, 2));
  EXPECT_EQ(pool.idle_bytes(), 3 * kPage);  // the destructor unmaps these
}

TEST(BufferPool, LargeRunsAreAlignedToHugePages) {
  for (const uint64_t pages : {1024, 1025, 5000}) {
    const Pages run = MapPages(pages * kPage);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(run.data) % (2 << 20), 0u);
    std::memset(run.data, 1, run.bytes);
    Unmap(run);
  }
  EXPECT_EQ(MapPages(uint64_t{1} << 60).data, nullptr);
}

}  // namespace
}  // namespace orlop::server
