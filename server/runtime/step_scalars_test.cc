#include "server/runtime/step_scalars.h"

#include <bit>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "gtest/gtest.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "server/job/job_model.h"
#include "server/job/manifest.h"
#include "server/step/job.h"
#include "server/step/leader.h"

namespace orlop::server {
namespace {

// Returns a job of three tensors, which SGD trains in groups of these manifest indexes.
std::shared_ptr<const JobModel> InGroups(const std::vector<std::vector<uint32_t>>& groups) {
  v1::JobDefinition definition;
  v1::CreateJobRequest& manifest = *definition.mutable_manifest();
  manifest.set_job("job");
  for (const char* name : {"a", "b", "c"}) {
    v1::TensorSpec& tensor = *manifest.add_tensors();
    tensor.set_name(name);
    tensor.set_dtype(v1::DTYPE_F32);
    tensor.add_shape(300);
  }
  EXPECT_TRUE(CompleteManifest(&manifest).ok());
  definition.set_server_count(1);
  for (uint32_t t = 0; t < 3; ++t) {
    v1::PlacementRun& run = *definition.add_runs();
    run.set_tensor(t);
    run.set_shard_count(1);
    run.add_servers(0);
  }
  for (const std::vector<uint32_t>& tensors : groups) {
    v1::OptimizerGroup& group = *definition.mutable_optimizer()->add_groups();
    group.set_optimizer("sgd");
    group.mutable_tensors()->Assign(tensors.begin(), tensors.end());
  }
  return JobModel::Make(std::move(definition)).value();
}

// Returns the values of SGD with this learning rate.
step::ParameterGroup WithLr(double lr) {
  step::ParameterGroup group;
  for (const double value : {lr, 0.9, 0.0, 0.0, 0.0})
    group.values.push_back({"", std::bit_cast<uint64_t>(value)});
  return group;
}

TEST(DecisionScalars, AreThoseOfTheGroupsThatTheDecisionWasBuiltWith) {
  const std::vector<step::ParameterGroup> groups = {WithLr(0.5), WithLr(0.25)};
  step::DecisionRecord decision;
  decision.kind = step::DecisionKind::kApply;
  decision.applied_count = {1, 7, 7};
  decision.untouched = {0, 0, 0};
  step::ScalarInputs inputs;
  inputs.groups = &groups;
  inputs.applied_count = &decision.applied_count;
  inputs.untouched = &decision.untouched;
  inputs.sum_of_squares = 1;
  inputs.scale = 1;
  decision.scalars = BuildScalars(*InGroups({{0, 1}, {2}}), 1, inputs).value();
  // The order of the groups has changed since, and a tensor has moved.
  const auto scalars = DecisionScalars::Parse(*InGroups({{2, 1}, {0}}), decision);
  ASSERT_TRUE(scalars.ok()) << scalars.status();
  const std::vector<float> lr = {0.5, 0.5, 0.25};
  for (uint32_t t = 0; t < 3; ++t) {
    const auto update = scalars->UpdateFor(t);
    bool found = false;
    for (const float value : update.scalars.span()) found |= value == lr[t];
    EXPECT_TRUE(found) << "tensor " << t;
  }
}

TEST(DecisionScalars, TensorWithoutAnyIsNamed) {
  step::DecisionRecord decision;
  decision.kind = step::DecisionKind::kApply;
  decision.applied_count = {1, 1, 1};
  decision.untouched = {0, 0, 0};
  v1::StepScalars wire;
  wire.add_sets()->add_tensors(900);
  decision.scalars = wire.SerializeAsString();
  const auto scalars = DecisionScalars::Parse(*InGroups({{0}, {1, 2}}), decision);
  EXPECT_EQ(scalars.status().message(), "a decision has no scalars for 'a'");
}

}  // namespace
}  // namespace orlop::server
