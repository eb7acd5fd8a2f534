#include "server/job/job_model.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "gtest/gtest.h"
#include "kernels/optimizer.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/job/manifest.h"
#include "server/job/optimizer_config.h"

namespace orlop::server {
namespace {

// Returns a job with two tensors of two shards each. One server owns both shards of "whole"; two
// servers own those of "split".
std::shared_ptr<const JobModel> TwoTensors() {
  v1::JobDefinition definition;
  v1::CreateJobRequest& manifest = *definition.mutable_manifest();
  manifest.set_job("job");
  manifest.set_shard_elements(256);
  for (const char* name : {"whole", "split"}) {
    v1::TensorSpec& tensor = *manifest.add_tensors();
    tensor.set_name(name);
    tensor.set_dtype(v1::DTYPE_F32);
    tensor.add_shape(300);
  }
  EXPECT_TRUE(CompleteManifest(&manifest).ok());
  definition.set_server_count(2);
  for (uint32_t shard = 0; shard < 4; ++shard) {
    v1::PlacementRun& run = *definition.add_runs();
    run.set_tensor(shard / 2);
    run.set_first_shard(shard % 2);
    run.set_shard_count(1);
    run.add_servers(shard == 2 ? 0 : 1);
  }
  return JobModel::Make(std::move(definition)).value();
}

v1::ConfigureOptimizerRequest Groups() {
  v1::ConfigureOptimizerRequest request;
  for (const char* optimizer : {"adamw", "lion"}) request.add_groups()->set_optimizer(optimizer);
  return request;
}

TEST(JobModel, SaysWhichTensorsLieWhole) {
  EXPECT_TRUE(TwoTensors()->LiesWhole(0));
  EXPECT_FALSE(TwoTensors()->LiesWhole(1));
}

TEST(JobModel, SplitTensorIsRefusedToAnOptimizerThatNeedsItWhole) {
  const auto lion = [](const kernels::Optimizer& optimizer) {
    return std::string(optimizer.name) == "lion";
  };
  const std::shared_ptr<const JobModel> model = TwoTensors();
  v1::ConfigureOptimizerRequest request = Groups();
  request.mutable_groups(0)->add_tensors(1);
  request.mutable_groups(1)->add_tensors(0);
  EXPECT_TRUE(CheckWholeTensors(*model, request, lion).ok());
  request.mutable_groups(0)->clear_tensors();
  request.mutable_groups(1)->add_tensors(1);
  EXPECT_TRUE(CheckWholeTensors(*model, request, [](const auto&) { return false; }).ok());
  const absl::Status refused = CheckWholeTensors(*model, request, lion);
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(DetailOf(refused).tensor(), "split");
  for (const char* word : {"group 1", "'lion'", "'split'", "2 shards", "TensorSpec.whole"})
    EXPECT_NE(refused.message().find(word), std::string::npos) << word << ": " << refused;
}

TEST(JobModel, WeightsThatAreStoredCannotBeClipped) {
  const std::shared_ptr<const JobModel> model = TwoTensors();
  v1::ConfigureOptimizerRequest request = Groups();
  request.set_max_norm(1.5);
  EXPECT_TRUE(ValidateOptimizer(*model, request).ok());
  request.add_groups()->set_optimizer("store");
  const absl::Status refused = ValidateOptimizer(*model, request);
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(DetailOf(refused).field(), "max_norm");
  for (const char* word : {"max_norm is 1.5", "group 2", "'store'"})
    EXPECT_NE(refused.message().find(word), std::string::npos) << word << ": " << refused;
  request.set_max_norm(0);
  EXPECT_TRUE(ValidateOptimizer(*model, request).ok());
}

}  // namespace
}  // namespace orlop::server
