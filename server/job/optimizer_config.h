// What a client says about a job's optimizers: checks, and the words of a group as formats. Pure;
// any thread.
#pragma once

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "kernels/optimizer.h"
#include "orlop/v1/job.pb.h"
#include "server/job/job_model.h"
#include "server/job/slots.h"

namespace orlop::server {

// The state format's word in a group: "8bit", "fp32" or "4bit".
const char* StateName(kernels::StateFormat format);
// The optimizer and formats of a group that ValidateOptimizer accepted. The state format is what
// the group asks for, before small tensors get fp32 state (StateFormatOf).
TensorOptimizer OptimizerOf(const v1::OptimizerGroup& group);

// Checks a configuration against the manifest.
//   Status  InvalidArgument naming group, tensor and value; or as CheckWholeTensors.
absl::Status ValidateOptimizer(const JobModel& model,
                               const v1::ConfigureOptimizerRequest& optimizer);

// The index of the first group whose optimizer takes weights (kernels::Optimizer::takes_weights):
// weights are neither clipped nor scaled. -1 if there is none. Optimizers are known by name.
int GroupThatTakesWeights(const v1::ConfigureOptimizerRequest& optimizer);

// Whether a step of this optimizer takes a pass over a whole tensor before it updates any element.
bool NeedsWholeTensor(const kernels::Optimizer& optimizer);
// Checks that every tensor which such an optimizer trains is on one server. `needs_whole` is
// NeedsWholeTensor except in tests.
//   Status  FailedPrecondition (CONFLICT) naming group, tensor, optimizer and what to do.
absl::Status CheckWholeTensors(
    const JobModel& model, const v1::ConfigureOptimizerRequest& optimizer,
    absl::FunctionRef<bool(const kernels::Optimizer&)> needs_whole = NeedsWholeTensor);

}  // namespace orlop::server
