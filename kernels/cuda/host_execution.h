// Runs a thread block on the host (block_step.h): one phase of all 256 threads, then the next.
#pragma once
#include "kernels/cuda/block_step.h"

namespace orlop::kernels::cuda {

template <size_t kReads>
class HostExecution {
 public:
  template <class Body>
  void Each(Body body) {
    for (uint32_t thread = 0; thread < kQuantBlock; ++thread) body(thread, registers_[thread]);
  }
  void Barrier() {}
  void Raise(uint32_t* word, uint32_t value) {
    if (value > *word) *word = value;
  }

 private:
  Registers<kReads> registers_[kQuantBlock];
};

// Runs all blocks of a batch, the last first, because on the device their order is undefined.
template <class O>
void RunOnHost(const Batch& batch) {
  for (uint64_t block = batch.first_block[batch.range_count]; block-- > 0;) {
    SharedMemory<std::size(O::kStates)> shared;
    HostExecution<kReads<O>> execution;
    BlockStep<O, HostExecution<kReads<O>>>(batch, block, shared, execution).Run();
  }
}

}  // namespace orlop::kernels::cuda
