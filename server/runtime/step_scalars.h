// The optimizer's arithmetic that the leader does once per step, and its way into every shard's
// kernel. Pure; any thread. Order: average, unscale, veto, norm, clip (kernels/optimizer.h does
// each in double).
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "orlop/v1/job.pb.h"
#include "server/job/job_model.h"
#include "server/shards/shard_store.h"
#include "server/step/leader.h"

namespace orlop::server {

// How many contributions an element of this layout sums: 1 for exactly-once.
//   InvalidArgument  tensors differ, so that one mean over the job has no meaning (both named)
absl::StatusOr<int64_t> ContributionsPerElement(const JobModel& model, const step::Layout& layout);

// Values of every group, in one fixed order. InvalidArgument (HYPER_PARAMETERS, `field`): a name
// missing or unknown, a value out of range, or another number of groups than configured.
absl::StatusOr<std::vector<step::ParameterGroup>> ParseGroups(
    const JobModel& model, const google::protobuf::RepeatedPtrField<v1::GroupValues>& groups);

// The scalars of a decision (v1::StepScalars, serialized).
absl::StatusOr<std::string> BuildScalars(const JobModel& model, int64_t contributions_per_element,
                                         const step::ScalarInputs& inputs);

// What a committed decision means for the shards of each tensor. One per decision, shared by its
// shards.
class DecisionScalars {
 public:
  static absl::StatusOr<DecisionScalars> Parse(const JobModel& model,
                                               const step::DecisionRecord& decision);
  ShardUpdate UpdateFor(uint32_t tensor) const { return updates_[tensor]; }

 private:
  std::vector<ShardUpdate> updates_;
};

// Fills outcome, norm, clip factor and identity.
void FillCommitted(const step::DecisionRecord& decision, v1::CommitStepResponse* response);

}  // namespace orlop::server
