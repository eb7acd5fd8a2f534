// The functions of the optimizers' .cu files that step.cc calls: LaunchAdamw and so on. Each starts
// one thread block for every block of the grid.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/cuda/geometry.h"

namespace orlop::kernels::cuda {

using Launch = cudaError_t (*)(const Batch& batch, Grid grid, cudaStream_t stream);

#define ORLOP_OPTIMIZER(name) \
  cudaError_t Launch##name(const Batch& batch, Grid grid, cudaStream_t stream);
#include "kernels/optimizers.inc"
#undef ORLOP_OPTIMIZER

}  // namespace orlop::kernels::cuda
