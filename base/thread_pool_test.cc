#include "base/thread_pool.h"

#include <sched.h>

#include <atomic>
#include <cstddef>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace orlop {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(ThreadPool, RunsEveryTaskOnceInEveryCall) {
  for (const int threads : {0, 1, 4}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.thread_count(), threads);
    for (const size_t count : {0, 1, 3, 1000}) {
      std::vector<std::atomic<int>> runs(count);
      pool.Run(count, [&](size_t i) { ++runs[i]; });
      for (const std::atomic<int>& run : runs) ASSERT_EQ(run, 1);
    }
  }
}

TEST(ThreadPool, ReadsListsOfProcessors) {
  EXPECT_THAT(ParseCpuList("0-2,8, 1").value(), ElementsAre(0, 1, 2, 8));
  EXPECT_THAT(ParseCpuList("").value(), ElementsAre());
  for (const char* list : {"a", "3-1", "1-2-3", "-1", "100000"}) {
    const absl::Status status = ParseCpuList(list).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << list;
    EXPECT_THAT(std::string(status.message()), HasSubstr(list));
  }
}

TEST(ThreadPool, PlacesThreadsOnANode) {
  EXPECT_THAT(std::string(CpusOf({0, {}, 1000}).status().message()),
              HasSubstr("no NUMA node 1000"));
  const auto node = CpusOf({0, {}, 0});
  if (!node.ok()) GTEST_SKIP() << "this machine tells nothing of its NUMA nodes";
  ASSERT_FALSE(node->empty());
  EXPECT_THAT(CpusOf({0, {node->back()}, 0}).value(), ElementsAre(node->back()));
}

TEST(ThreadPool, RunsWhatWasSubmittedBeforeItStops) {
  std::atomic<int> runs = 0;
  {
    ThreadPool pool(2);
    for (int i = 0; i < 100; ++i) pool.Submit([&] { ++runs; });
    pool.Run(10, [&](size_t) { ++runs; });
  }
  EXPECT_EQ(runs, 110);
}

TEST(ThreadPool, PinsItsThreads) {
  cpu_set_t allowed;
  ASSERT_EQ(sched_getaffinity(0, sizeof(allowed), &allowed), 0);
  int cpu = 0;
  while (!CPU_ISSET(cpu, &allowed)) ++cpu;
  ThreadPool pool(1, {cpu});
  EXPECT_TRUE(pool.pinned().ok());
  cpu_set_t now;
  pool.Submit([&now] { sched_getaffinity(0, sizeof(now), &now); });
  pool.Stop();
  EXPECT_EQ(CPU_COUNT(&now), 1);
  EXPECT_TRUE(CPU_ISSET(cpu, &now));
}

TEST(ThreadPool, SaysThatItsProcessorsDoNotExist) {
  ThreadPool pool(1, {CPU_SETSIZE - 1});
  EXPECT_THAT(std::string(pool.pinned().message()), HasSubstr(std::to_string(CPU_SETSIZE - 1)));
}

}  // namespace
}  // namespace orlop
