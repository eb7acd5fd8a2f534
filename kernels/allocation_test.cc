// Tests that a step allocates nothing (optimizer.h) by counting this program's calls of operator
// new.
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/blocks.h"
#include "kernels/optimizer.h"
#include "kernels/testing/test_data.h"
#include "kernels/testing/test_range.h"
#include "kernels/types.h"

namespace {

thread_local size_t allocations = 0;  // count of this thread

void* Counted(void* memory) {
  ++allocations;
  return memory == nullptr ? throw std::bad_alloc() : memory;
}

}  // namespace

// The other forms of operator new call these.
void* operator new(size_t size) { return Counted(std::malloc(size > 0 ? size : 1)); }
void* operator new(size_t size, std::align_val_t alignment) {
  const auto unit = static_cast<size_t>(alignment);
  return Counted(std::aligned_alloc(unit, (size + unit - 1) / unit * unit));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

namespace orlop::kernels {
namespace {

TEST(Allocation, IsSeen) {
  constexpr std::align_val_t kWide{64};
  const size_t before = allocations;
  void* const plain = ::operator new(10);
  void* const wide = ::operator new(10, kWide);
  EXPECT_EQ(allocations - before, 2u);
  ::operator delete(plain);
  ::operator delete(wide, kWide);
}

TEST(Allocation, IsNoneInAStep) {
  testing::Source source(70);
  size_t steps = 0;
  for (const OptimizerUnit& unit : OptimizerUnits()) {
    const std::vector<double> values = testing::Values(unit.optimizer);
    for (const testing::Formats& formats : testing::AllFormats()) {
      testing::Range range(&unit.optimizer, formats,
                           source.Floats(3 * kQuantBlock + 77, testing::Hostility::kTame));
      for (const DType dtype : testing::kAllTypes) {
        const testing::OddlyAligned gradient(source, dtype, range.count, testing::Hostility::kTame);
        testing::ForEachTarget([&] {
          const StepScalars scalars = unit.optimizer.Prepare(values, 0, 1.0f);
          const RangeStep step = range.StepOf(scalars, gradient.span());
          ASSERT_TRUE(Step(step).ok());  // makes the allocations that happen once
          const size_t before = allocations;
          const bool ok = Step(step).ok();
          const size_t made = allocations - before;
          EXPECT_TRUE(ok);
          EXPECT_EQ(made, 0u) << unit.optimizer.name << " " << NameOf(formats) << ", seed 70";
          ++steps;
        });
      }
    }
  }
  std::printf("%zu steps, seed 70\n", steps);
}

}  // namespace
}  // namespace orlop::kernels
