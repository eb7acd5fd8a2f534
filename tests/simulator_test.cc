// Seeded crash schedules of the step machines against the oracle. ORLOP_SIM_SCHEDULES sets how many
// (100,000 unless set), ORLOP_SIM_SEED the first seed: a failure prints the seed that replays it.
#include "tests/simulator.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace orlop::step {
namespace {

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

struct Totals {
  int64_t steps = 0, epochs = 0, events = 0;
  std::array<int64_t, kMetCount> schedules = {};  // that met it
  std::array<int64_t, kMetCount> times = {};

  void Add(const SimulationResult& result) {
    steps += result.acknowledged_steps;
    epochs += result.epochs;
    events += result.events;
    for (size_t i = 0; i < kMetCount; ++i) {
      schedules[i] += result.met[i] > 0;
      times[i] += result.met[i];
    }
  }
  void Add(const Totals& other) {
    steps += other.steps, epochs += other.epochs, events += other.events;
    for (size_t i = 0; i < kMetCount; ++i) {
      schedules[i] += other.schedules[i], times[i] += other.times[i];
    }
  }
  void Print() const {
    std::printf("%" PRId64 " acknowledged steps, %" PRId64 " epochs, %" PRId64 " events\n", steps,
                epochs, events);
    std::printf("%10s %10s\n", "schedules", "times");
    for (size_t i = 0; i < kMetCount; ++i) {
      std::printf("%10" PRId64 " %10" PRId64 "  %s\n", schedules[i], times[i],
                  Describe(static_cast<Met>(i)));
    }
  }
};

TEST(Simulator, NoScheduleLosesOrRepeatsAnAcknowledgedStep) {
  const uint64_t first = FromEnvironment("ORLOP_SIM_SEED", 1);
  const uint64_t count = FromEnvironment("ORLOP_SIM_SCHEDULES", 100'000);
  std::atomic<uint64_t> next = first;
  std::mutex mutex;
  Totals totals;
  std::vector<std::string> failures;
  const auto work = [&] {  // each schedule is single-threaded; threads take different seeds
    Totals mine;
    for (uint64_t seed; (seed = next++) < first + count;) {
      const SimulationResult result = RunSchedule(seed);
      mine.Add(result);
      if (result.ok) continue;
      const std::lock_guard lock(mutex);
      failures.push_back("seed " + std::to_string(seed) + " (" + result.description +
                         "): " + result.failure);
      next = first + count;
    }
    const std::lock_guard lock(mutex);
    totals.Add(mine);
  };
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::clamp(std::thread::hardware_concurrency(), 1u, 8u); ++i) {
    threads.emplace_back(work);
  }
  for (std::thread& thread : threads) thread.join();
  std::printf("%" PRIu64 " schedules from seed %" PRIu64 ": ", count, first);
  totals.Print();
  for (const std::string& failure : failures) ADD_FAILURE() << failure;
  if (count < 1000 || !failures.empty()) return;  // too few to meet everything
  for (size_t i = 0; i < kMetCount; ++i) {
    EXPECT_GT(totals.schedules[i], 0) << "no schedule met: " << Describe(static_cast<Met>(i));
  }
}

TEST(Simulator, SeedReplaysTheSameRun) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const SimulationResult first = RunSchedule(seed);
    const SimulationResult again = RunSchedule(seed);
    EXPECT_EQ(first.events, again.events) << "seed " << seed;
    EXPECT_EQ(first.epochs, again.epochs) << "seed " << seed;
    EXPECT_EQ(first.acknowledged_steps, again.acknowledged_steps) << "seed " << seed;
    EXPECT_EQ(first.met, again.met) << "seed " << seed;
  }
}

}  // namespace
}  // namespace orlop::step
