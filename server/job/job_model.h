// A job as its definition fixes it: names, shapes, shards, owners and formats, computed once. Pure
// and immutable; any thread.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "kernels/optimizer.h"
#include "orlop/v1/peer.pb.h"
#include "server/job/slots.h"
#include "server/shards/shard.h"
#include "server/shards/shard_store.h"
#include "server/step/job.h"
#include "server/step/layout.h"

namespace orlop::server {

// InvalidArgument naming tensor, field, value and limit. `tensor` is checked alone; Model::Make
// checks names against one another.
absl::Status ValidateTensorSpec(const v1::TensorSpec& tensor);
// "8bit", "fp32" or "4bit".
const char* StateName(kernels::StateFormat format);

absl::Status ValidateName(absl::string_view what, absl::string_view name);

// Whole request, pages joined. Sets shard_elements and durability where they were left to the
// server.
//   Unimplemented  a durability level that this build does not offer, by name
absl::Status CompleteManifest(v1::CreateJobRequest* manifest);
Digest128 ManifestDigest(const v1::CreateJobRequest& manifest);

class JobModel {
 public:
  // InvalidArgument if the definition contradicts itself.
  static absl::StatusOr<std::shared_ptr<const JobModel>> Make(v1::JobDefinition definition);

  const v1::JobDefinition& definition() const { return definition_; }
  const std::string& job() const { return definition_.manifest().job(); }
  uint64_t shard_elements() const { return definition_.manifest().shard_elements(); }
  const std::vector<Tensor>& tensors() const { return tensors_; }
  const std::shared_ptr<const step::JobSpec>& spec() const { return spec_; }
  uint64_t parameter_count() const { return parameter_count_; }

  absl::StatusOr<uint32_t> FindTensor(
      absl::string_view name) const;  // tied names too; NotFound UNKNOWN_TENSOR
  int32_t FirstShard(uint32_t tensor) const { return first_shard_[tensor]; }
  uint64_t ShardCountOf(uint32_t tensor) const {
    return first_shard_[tensor + 1] - first_shard_[tensor];
  }
  int Owner(int32_t shard) const { return spec_->shards[shard].copies[0]; }
  // Whether all shards of the tensor lie on one server.
  bool LiesWhole(uint32_t tensor) const;
  const std::string& ReasonOf(int32_t shard) const;

  JobLayout LayoutFor(int server) const;
  std::vector<TensorOptimizer> Optimizers() const;  // per tensor
  // Index of the tensor's group; -1: in none.
  int GroupOf(uint32_t tensor) const { return group_[tensor]; }
  // Whether a gradient is expected: a parameter, and of some group once there is a configuration.
  bool Trains(uint32_t tensor) const {
    return tensors_[tensor].is_parameter && (!definition_.has_optimizer() || group_[tensor] >= 0);
  }

 private:
  JobModel() = default;
  absl::Status Build();

  v1::JobDefinition definition_;
  std::vector<Tensor> tensors_;
  std::vector<int32_t> first_shard_;  // one more than tensors
  std::map<std::string, uint32_t, std::less<>> by_name_;
  std::vector<int32_t> run_of_shard_;
  std::vector<int> group_;
  std::shared_ptr<const step::JobSpec> spec_;
  uint64_t parameter_count_ = 0;
};

// Checks a configuration against the manifest. InvalidArgument naming group, tensor and value; or
// as CheckWholeTensors.
absl::Status ValidateOptimizer(const JobModel& model,
                               const v1::ConfigureOptimizerRequest& optimizer);

// Index of the first group whose optimizer takes weights (kernels::Optimizer::takes_weights), which
// are neither clipped nor scaled. -1: none. Optimizers are known by name.
int GroupThatTakesWeights(const v1::ConfigureOptimizerRequest& optimizer);

// Whether a step of this optimizer looks at all of a tensor before it updates any element.
bool NeedsWholeTensor(const kernels::Optimizer& optimizer);
// Checks that what such an optimizer trains lies on one server each. FailedPrecondition naming
// group, tensor, optimizer and what to do. `needs_whole` is NeedsWholeTensor, but for tests.
absl::Status CheckWholeTensors(
    const JobModel& model, const v1::ConfigureOptimizerRequest& optimizer,
    absl::FunctionRef<bool(const kernels::Optimizer&)> needs_whole = NeedsWholeTensor);

// A wire box as the step machine and the store speak of it: flat wherever its elements are one
// range.
//   InvalidArgument  a box outside the tensor
absl::StatusOr<Box> NormalBox(const Tensor& tensor, const v1::Box* box);
Box FromStepBox(const step::Box& box);

// One rank's part of a contribution layout. InvalidArgument naming tensor and box.
absl::StatusOr<std::vector<step::Contribution>> Contributions(const JobModel& model,
                                                              const v1::ContributionLayout& layout,
                                                              uint32_t rank, uint32_t world_size);
// Every piece that the shards of `layout` expect from `contributions`, for ShardStore::SetLayout.
std::vector<ExpectedPiece> PiecesFor(const JobModel& model, const JobLayout& owned,
                                     const step::Layout& contributions);

}  // namespace orlop::server
