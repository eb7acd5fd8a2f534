// One optimizer's kernel and its launch. optimizer_unit.cu.in defines ORLOP_OPTIMIZER_*.
#include "kernels/cuda/block_step.h"
#include "kernels/cuda/launch.h"

namespace orlop::kernels::cuda {
namespace ORLOP_OPTIMIZER_NAMESPACE {

#define ORLOP_RULE __host__ __device__
#include "kernels/optimizers/lerp.h"
#include ORLOP_OPTIMIZER_HEADER

using O = ORLOP_OPTIMIZER_STRUCT;
inline constexpr size_t kStates = std::size(O::kStates);

// One thread of a thread block (block_step.h).
class DeviceExecution {
 public:
  template <class Body>
  __device__ __forceinline__ void Each(Body body) {
    body(threadIdx.x, registers_);
  }
  __device__ __forceinline__ void Barrier() { __syncthreads(); }
  // One atomic operation per warp.
  __device__ __forceinline__ void Raise(uint32_t* word, uint32_t value) {
    const uint32_t largest = __reduce_max_sync(0xFFFFFFFFu, value);
    if (threadIdx.x % 32 == 0) atomicMax(word, largest);
  }

 private:
  Registers<kReads<O>> registers_;
};

__global__ void __launch_bounds__(kQuantBlock)
    StepBlocks(const __grid_constant__ Batch batch, uint64_t first_block) {
  __shared__ SharedMemory<kStates> shared;
  DeviceExecution execution;
  BlockStep<O, DeviceExecution>(batch, first_block + blockIdx.x, shared, execution).Run();
}

}  // namespace ORLOP_OPTIMIZER_NAMESPACE

cudaError_t ORLOP_OPTIMIZER_LAUNCH(const Batch& batch, Grid grid, cudaStream_t stream) {
  ORLOP_OPTIMIZER_NAMESPACE::StepBlocks<<<grid.block_count, kQuantBlock, 0, stream>>>(
      batch, grid.first_block);
  return cudaGetLastError();
}

}  // namespace orlop::kernels::cuda
