// Optimizer steps (kernels::Step in kernels/optimizer.h) on a CUDA device. nvcc compiles the same
// optimizer rules (kernels/optimizers/) that the CPU uses, so both produce the same bits.
#pragma once
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/optimizer.h"

// cudaStream_t is CUstream_st*, so this header does not need the CUDA headers.
struct CUstream_st;

namespace orlop::kernels::cuda {

// Queues one optimizer step of each range (kernels::RangeStep) on `stream` and returns without
// waiting for the device. Up to 120 consecutive ranges that have the same optimizer share one
// launch; their gradient dtypes, state formats and master formats may differ.
//   Arrays   are in memory of the current device. Each is aligned to its element type, the gradient
//            too, although kernels::Step takes an unaligned one. No two ranges overlap. The caller
//            keeps the arrays until the stream has executed the launches. `ranges` and the scalars
//            are in host memory and are copied before the return.
//   Memory   The call allocates none, so it may be captured in a CUDA graph.
//   Error    bit-identical to the reference (kernels/reference.h).
//   Threads  Any number of threads may call at once, on any streams, if their ranges are disjoint.
//   Status   InvalidArgument: the errors of kernels::Step, with the index of the range in the
//            message. Nothing was launched.
//            Unavailable: CUDA refused a launch; the message has CUDA's reason. The launches before
//            it are in the stream; the ranges of later ones are not stepped.
absl::Status Step(absl::Span<const RangeStep> ranges, CUstream_st* stream);

// Returns the number of CUDA devices; 0 if CUDA reports an error, as it does without a driver.
int DeviceCount();

}  // namespace orlop::kernels::cuda
