#include "kernels/cuda/step.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/blocks.h"
#include "kernels/cuda/batch.h"
#include "kernels/cuda/geometry.h"
#include "kernels/cuda/launch.h"
#include "kernels/optimizer.h"

namespace orlop::kernels::cuda {
namespace {

// In the order of OptimizerUnits().
constexpr Launch kLaunches[] = {
#define ORLOP_OPTIMIZER(name) Launch##name,
#include "kernels/optimizers.inc"
#undef ORLOP_OPTIMIZER
};

Launch LaunchOf(const Optimizer* optimizer) {
  const absl::Span<const OptimizerUnit> units = OptimizerUnits();
  size_t i = 0;
  while (&units[i].optimizer != optimizer) ++i;  // CheckStep has made sure that it is found
  return kLaunches[i];
}

absl::Status LaunchBatch(const Batch& batch, Launch launch, cudaStream_t stream) {
  const uint64_t blocks = batch.first_block[batch.range_count];
  for (Grid grid = NextGrid(0, blocks); grid.block_count > 0;
       grid = NextGrid(grid.first_block + grid.block_count, blocks)) {
    const cudaError_t error = launch(batch, grid, stream);
    if (error != cudaSuccess)
      return absl::UnavailableError(
          absl::StrCat("CUDA did not launch a step: ", cudaGetErrorString(error)));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Step(absl::Span<const RangeStep> ranges, CUstream_st* stream) {
  if (absl::Status status = CheckRanges(ranges); !status.ok()) return status;
  Batch batch;
  while (!ranges.empty()) {
    const Launch launch = LaunchOf(ranges[0].optimizer);
    ranges.remove_prefix(FillBatch(ranges, &batch));
    if (absl::Status status = LaunchBatch(batch, launch, stream); !status.ok()) return status;
  }
  return absl::OkStatus();
}

int DeviceCount() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace orlop::kernels::cuda
