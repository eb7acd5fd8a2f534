#include "kernels/targets.h"

#include "hwy/highway.h"
#include "kernels/simd_targets.h"  // before Highway

namespace orlop::kernels {
namespace {

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
