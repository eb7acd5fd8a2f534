// What a job's definition fixes: its tensors, their shards, the owner of each shard, and the
// formats that the optimizer configuration asks for. It is computed once.
//   Threads  A JobModel is immutable and safe from any thread.
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

// `tensor` is an index in the manifest. `shard` is an id: an index in manifest order among all
// shards of the job. Both must be in range.
class JobModel {
 public:
  // A definition without runs is one that is not placed yet (server/cluster/placement.h). Its model
  // has no owners: Owner, LiesWhole, ReasonOf and LayoutFor must not be called.
  //   Status  InvalidArgument: a tensor is invalid, two tensors have the same name, there are more
  //           than kMaxShards shards, or the placement does not fit the manifest.
  static absl::StatusOr<std::shared_ptr<const JobModel>> Make(v1::JobDefinition definition);

  const v1::JobDefinition& definition() const { return definition_; }
  const std::string& job() const { return definition_.manifest().job(); }
  uint64_t shard_elements() const { return definition_.manifest().shard_elements(); }
  const std::vector<Tensor>& tensors() const { return tensors_; }
  const std::shared_ptr<const step::JobSpec>& spec() const { return spec_; }
  // Returns the number of elements of all parameters; buffers are not counted.
  uint64_t parameter_count() const { return parameter_count_; }

  // Returns the tensor that has `name` as its name or as a tied name.
  //   Status  NotFound (UNKNOWN_TENSOR).
  absl::StatusOr<uint32_t> FindTensor(absl::string_view name) const;
  // Returns the id of the tensor's first shard; those of its other shards follow.
  int32_t FirstShard(uint32_t tensor) const { return first_shard_[tensor]; }
  uint64_t ShardCountOf(uint32_t tensor) const {
    return first_shard_[tensor + 1] - first_shard_[tensor];
  }
  // Returns the server that owns the shard, as an index in the sorted list of peers.
  int Owner(int32_t shard) const { return spec_->shards[shard].copies[0]; }
  // Returns whether one server owns all shards of the tensor.
  bool LiesWhole(uint32_t tensor) const;
  // Returns why this owner was chosen, as a sentence for people (PlacementRun.reason).
  const std::string& ReasonOf(int32_t shard) const;

  // Returns the shards that `server` owns. (This is not a contribution layout.)
  OwnedShards LayoutFor(int server) const;
  // Returns the optimizer and the formats of each tensor; frozen if the tensor is in no group.
  std::vector<TensorOptimizer> Optimizers() const;
  // Returns the index of the tensor's optimizer group; -1 if it is in none.
  int GroupOf(uint32_t tensor) const { return group_[tensor]; }
  // Returns whether the tensor gets gradients. It must be a parameter. Once there is an optimizer
  // configuration, it must also be in a group.
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
  // By tensor, the id of its first shard. One more entry holds the number of shards.
  std::vector<int32_t> first_shard_;
  std::map<std::string, uint32_t, std::less<>> by_name_;  // tied names too
  std::vector<int32_t> run_of_shard_;                     // index in definition_.runs; -1: none
  std::vector<int> group_;                                // by tensor, as GroupOf
  std::shared_ptr<const step::JobSpec> spec_;
  uint64_t parameter_count_ = 0;
};

}  // namespace orlop::server
