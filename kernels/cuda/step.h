// kernels::Step on a CUDA device, to the same bits: the rules of kernels/optimizers/ compiled by
// nvcc.
#pragma once
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/optimizer.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace orlop::kernels::cuda {

// Steps many ranges (optimizer.h, RangeStep) in one launch for every 120 in a row of one optimizer;
// their formats may differ. Returns when they are in the stream.
//   Arrays   in memory of the current device, aligned to their elements, gradients included. No two
//            ranges overlap. They must stay until the stream has passed.
//   Memory   none is allocated; the stream may be under capture.
//   Error    bit-identical to the reference (reference.h).
//   Threads  as many streams and threads as wanted, on disjoint ranges.
//   Status   InvalidArgument as kernels::Step, with the index of the range: then nothing was
//            launched. Unavailable: CUDA refused a launch, for the reason given; the ranges before
//            it are being stepped.
absl::Status Step(absl::Span<const RangeStep> ranges, CUstream_st* stream);

// Devices that can be used; 0 without a driver.
int DeviceCount();

}  // namespace orlop::kernels::cuda
