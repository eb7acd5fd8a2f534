// A job as its definition fixes it: names, shapes, shards, owners and formats, computed once. Pure
// and immutable; any thread.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "orlop/v1/peer.pb.h"
#include "server/job/slots.h"
#include "server/step/job.h"

namespace orlop::server {

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

  OwnedShards LayoutFor(int server) const;
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
  absl::Status AddTensor(const v1::TensorSpec& wire, step::JobSpec* spec);
  absl::Status AddPlacement(step::JobSpec* spec);

  v1::JobDefinition definition_;
  std::vector<Tensor> tensors_;
  std::vector<int32_t> first_shard_;  // one more than tensors
  std::map<std::string, uint32_t, std::less<>> by_name_;
  std::vector<int32_t> run_of_shard_;
  std::vector<int> group_;
  std::shared_ptr<const step::JobSpec> spec_;
  uint64_t parameter_count_ = 0;
};

}  // namespace orlop::server
