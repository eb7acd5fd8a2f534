// Which instruction sets this binary and this machine have, and how tests run on each of them.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace orlop::kernels {

// Highway's bits of every instruction set whose kernels can run here, best first: the first is the
// one in use.
std::vector<int64_t> SupportedTargets();

// "AVX3", "AVX2", "NEON", or "SCALAR" for the reference. For logs and tests.
std::string TargetName(int64_t target);

// Runs kernels on one instruction set while it lives. For tests: no other thread may call kernels.
class ScopedTarget {
 public:
  explicit ScopedTarget(int64_t target);
  ~ScopedTarget();
  ScopedTarget(const ScopedTarget&) = delete;
  ScopedTarget& operator=(const ScopedTarget&) = delete;
};

}  // namespace orlop::kernels
