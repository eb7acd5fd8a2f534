// Converts RangeSteps to the batches that CUDA kernels read (geometry.h). Uses no CUDA, so the
// tests run it on the host.
#pragma once
#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/blocks.h"
#include "kernels/cuda/geometry.h"

namespace orlop::kernels::cuda {

// `step` must have at least one element and have passed CheckStep.
inline RangeDescriptor DescriptorOf(const RangeStep& step) {
  RangeDescriptor range{};
  range.gradient = step.gradient.data;
  range.weight = step.weight;
  range.new_weight = step.new_weight;
  range.remainder = step.remainder;
  range.input = step.input;
  range.random = step.random;
  range.first_block = step.first_block;
  range.count = step.gradient.count;
  range.dtype = step.gradient.dtype;
  range.master = step.master;
  range.format = step.format;
  range.keeps_state = step.optimizer->KeepsState(step.scalars);
  for (size_t s = 0; s < step.optimizer->states.size(); ++s) {
    range.values[s] = step.states[s].values;
    range.absmax[s] = step.states[s].absmax;
    range.rounding[s] = RoundingOf(step, s);
  }
  std::copy(step.scalars.begin(), step.scalars.end(), range.scalars);
  return range;
}

// Returns the errors of kernels::Step, and an error for a gradient that is not aligned to its
// elements.
inline absl::Status CheckRanges(absl::Span<const RangeStep> steps) {
  for (size_t i = 0; i < steps.size(); ++i) {
    absl::Status status = CheckStep(steps[i]);
    const TypedSpan& gradient = steps[i].gradient;
    if (status.ok() && reinterpret_cast<uintptr_t>(gradient.data) % SizeOf(gradient.dtype) != 0)
      status = absl::InvalidArgumentError("gradient is not aligned to its elements");
    if (!status.ok())
      return absl::InvalidArgumentError(absl::StrCat("range ", i, ": ", status.message()));
  }
  return absl::OkStatus();
}

// Fills *batch with the first of `steps`: those of one optimizer, as many as fit. Returns how many
// it took; ranges of no elements are counted and left out.
inline size_t FillBatch(absl::Span<const RangeStep> steps, Batch* batch) {
  batch->range_count = 0;
  batch->first_block[0] = 0;
  size_t taken = 0;
  for (; taken < steps.size() && steps[taken].optimizer == steps[0].optimizer; ++taken) {
    const uint64_t count = steps[taken].gradient.count;
    if (count == 0) continue;
    if (batch->range_count == kRangesPerBatch) break;
    const uint32_t i = batch->range_count++;
    batch->ranges[i] = DescriptorOf(steps[taken]);
    batch->first_block[i + 1] = batch->first_block[i] + BlockCount(count);
  }
  return taken;
}

}  // namespace orlop::kernels::cuda
