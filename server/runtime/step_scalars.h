// The optimizer arithmetic that the step leader does once per step, in fp64, and its result as each
// shard's kernel needs it. The leader computes the norm of the averaged, unscaled gradient and the
// clip factor (kernels::PrepareGradientScale), then the scalars of each optimizer group
// (kernels::Optimizer::Prepare).
//   Threads  The functions are pure and safe from any thread.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "orlop/v1/job.pb.h"
#include "server/job/job_model.h"
#include "server/shards/shard_store.h"
#include "server/step/leader.h"

namespace orlop::server {

// Returns how many contributions are summed into each element under a validated `layout`. It is 1
// in mode kExactlyOnce, and if there are no contributions. reduce = "mean" divides by it.
//   Status  InvalidArgument: two tensors, which the message names, have different numbers, so there
//           is no one mean.
absl::StatusOr<int64_t> ContributionsPerElement(const JobModel& model, const step::Layout& layout);

// Converts the hyper-parameters of a CommitStep. `groups` has one entry for each configured group,
// in order. Each returned group has the values of all hyper-parameters of its optimizer, in the
// order of kernels::Optimizer::hyper_parameters.
//   Status  InvalidArgument (HYPER_PARAMETERS, `field`): a name is missing or unknown, a value is
//           out of range, or the number of groups is not the configured one.
absl::StatusOr<std::vector<step::ParameterGroup>> ParseGroups(
    const JobModel& model, const google::protobuf::RepeatedPtrField<v1::GroupValues>& groups);

// Computes the scalars of an APPLY. Returns a serialized v1::StepScalars, for
// step::DecisionRecord::scalars. `contributions_per_element` is from ContributionsPerElement.
//   Status  FailedPrecondition: the number of groups has changed since the CommitStep.
//           InvalidArgument (HYPER_PARAMETERS, `field`): fp32 cannot hold a scalar.
absl::StatusOr<std::string> BuildScalars(const JobModel& model, int64_t contributions_per_element,
                                         const step::ScalarInputs& inputs);

// The updates that a committed decision asks of each tensor's shards. It is parsed once per
// decision and shared by all shards.
class DecisionScalars {
 public:
  // `model` must give each tensor the optimizer that the decision was built with. Its groups may be
  // others.
  //   Status  DataLoss: the scalars cannot be read, or a tensor has none.
  static absl::StatusOr<DecisionScalars> Parse(const JobModel& model,
                                               const step::DecisionRecord& decision);
  // Returns the update for each shard of a tensor (its index in the manifest), without `pass` and
  // `loads`.
  ShardUpdate UpdateFor(uint32_t tensor) const { return updates_[tensor]; }

 private:
  std::vector<ShardUpdate> updates_;  // by tensor
};

// Sets the response's step, outcome, decision (its identity), gradient_norm, clip_factor and
// nonfinite_count. After a SKIP the norm is NaN, after a LOAD 0; the clip factor is 1 after both.
void FillCommitted(const step::DecisionRecord& decision, v1::CommitStepResponse* response);

}  // namespace orlop::server
