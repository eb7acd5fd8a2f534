// The optimizer configuration of a job (v1::ConfigureOptimizerRequest): its checks, and the words
// in its groups ("8bit", "exact", ...) as enums of the kernels.
//   Threads  The functions are pure and safe from any thread.
#pragma once

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "kernels/optimizer.h"
#include "orlop/v1/job.pb.h"
#include "server/job/job_model.h"
#include "server/job/slots.h"

namespace orlop::server {

// Returns the word for a state format in a group: "8bit", "fp32" or "4bit".
const char* StateName(kernels::StateFormat format);
// Returns the optimizer and the formats of a group that ValidateOptimizer has accepted. The state
// format is the one that the group asks for; StateFormatOf gives small tensors fp32 instead.
TensorOptimizer OptimizerOf(const v1::OptimizerGroup& group);

// Checks a configuration against the manifest.
//   Status  InvalidArgument (BAD_REQUEST), naming group, tensor and value; or the error of
//           CheckWholeTensors.
absl::Status ValidateOptimizer(const JobModel& model,
                               const v1::ConfigureOptimizerRequest& optimizer);

// Returns the index of the first group whose optimizer takes new weights instead of gradients
// (kernels::Optimizer::takes_weights); -1 if there is none. Weights are neither clipped nor scaled.
// The optimizer of every group must be a known name.
int GroupThatTakesWeights(const v1::ConfigureOptimizerRequest& optimizer);

// Returns whether a step of this optimizer takes a pass over the whole tensor before it updates any
// element. One server must then own all shards of the tensor.
bool NeedsWholeTensor(const kernels::Optimizer& optimizer);
// Checks that one server owns all shards of every tensor whose optimizer needs it whole. The
// optimizer of every group must be a known name. Tests replace `needs_whole`.
//   Status  FailedPrecondition (CONFLICT), naming group, tensor, optimizer and what to do.
absl::Status CheckWholeTensors(
    const JobModel& model, const v1::ConfigureOptimizerRequest& optimizer,
    absl::FunctionRef<bool(const kernels::Optimizer&)> needs_whole = NeedsWholeTensor);

}  // namespace orlop::server
