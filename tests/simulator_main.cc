// Runs schedules until one fails: `simulator FIRST COUNT`. Prints the seed of the first failure and
// exits with 1, or exits with 0. For planted bugs and for replaying a seed.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "tests/simulator.h"

int main(int argc, char** argv) {
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const uint64_t count = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1000;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    const orlop::step::SimulationResult result = orlop::step::RunSchedule(seed);
    if (result.ok) continue;
    std::printf("seed %llu (%s): %s\n", static_cast<unsigned long long>(seed),
                result.description.c_str(), result.failure.c_str());
    return 1;
  }
  std::printf("%llu schedules from seed %llu: no failure\n", static_cast<unsigned long long>(count),
              static_cast<unsigned long long>(first));
  return 0;
}
