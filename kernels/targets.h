// The instruction sets of this binary and this machine, and a way to run tests on each of them.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace orlop::kernels {

// Returns Highway's bits of the instruction sets whose kernels can run here, best first. The first
// is in use.
std::vector<int64_t> SupportedTargets();

// Returns "AVX3", "AVX2", "NEON", or "SCALAR" for the reference. For logs and tests.
std::string TargetName(int64_t target);

// While it lives, kernels run on one instruction set. For tests: no other thread may call kernels.
class ScopedTarget {
 public:
  explicit ScopedTarget(int64_t target);
  ~ScopedTarget();
  ScopedTarget(const ScopedTarget&) = delete;
  ScopedTarget& operator=(const ScopedTarget&) = delete;
};

}  // namespace orlop::kernels
