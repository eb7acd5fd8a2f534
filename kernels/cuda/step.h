// kernels::Step on a CUDA device, with the same bits: nvcc compiles the rules of
// kernels/optimizers/.
#pragma once
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/optimizer.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace orlop::kernels::cuda {

// Steps many ranges (optimizer.h, RangeStep). Up to 120 consecutive ranges of one optimizer share a
// launch; their formats may differ. Returns when the launches are in the stream.
//   Arrays   in memory of the current device, aligned to their elements, gradients included. No two
//            ranges overlap. Keep the arrays until the stream has passed the launches.
//   Memory   none is allocated; the stream may be under capture.
//   Error    bit-identical to the reference (reference.h).
//   Threads  any number of streams and threads, on disjoint ranges.
//   Status   InvalidArgument as kernels::Step, with the index of the range: then nothing was
//            launched. Unavailable: CUDA refused a launch, with its reason; earlier ranges are
//            being stepped.
absl::Status Step(absl::Span<const RangeStep> ranges, CUstream_st* stream);

// Returns the number of usable devices; 0 without a driver.
int DeviceCount();

}  // namespace orlop::kernels::cuda
