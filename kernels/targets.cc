#include "kernels/targets.h"

#include <cstdint>
#include <string>
#include <vector>

// The instruction sets must be declared before Highway is included.
// clang-format off
#include "kernels/simd_targets.h"
#include "hwy/highway.h"
// clang-format on

namespace orlop::kernels {
namespace {

#if HWY_ARCH_X86
static_assert((HWY_TARGETS & HWY_AVX3_DL) != 0, "tests would leave out what most machines run");
#endif

void Choose(int64_t targets) {
  hwy::SetSupportedTargetsForTest(targets);
  hwy::GetChosenTarget().DeInit();  // the next dispatch chooses again
}

}  // namespace

std::vector<int64_t> SupportedTargets() { return hwy::SupportedAndGeneratedTargets(); }

std::string TargetName(int64_t target) { return hwy::TargetName(target); }

ScopedTarget::ScopedTarget(int64_t target) { Choose(target); }

ScopedTarget::~ScopedTarget() { Choose(0); }

}  // namespace orlop::kernels
