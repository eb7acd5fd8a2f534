#include "server/job/job_model.h"

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "kernels/types.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/convert.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/job/manifest.h"
#include "server/job/optimizer_config.h"
#include "server/job/slots.h"
#include "server/step/job.h"
#include "server/step/layout.h"

namespace orlop::server {

absl::StatusOr<std::shared_ptr<const JobModel>> JobModel::Make(v1::JobDefinition definition) {
  std::shared_ptr<JobModel> model(new JobModel());
  model->definition_ = std::move(definition);
  if (absl::Status status = model->Build(); !status.ok()) return status;
  return std::shared_ptr<const JobModel>(std::move(model));
}

absl::Status JobModel::Build() {
  const v1::CreateJobRequest& manifest = definition_.manifest();
  auto spec = std::make_shared<step::JobSpec>();
  spec->manifest_digest = FromWire(definition_.manifest_digest());
  spec->level = step::Level::kMemory;  // CompleteManifest refuses every other level
  spec->arithmetic_version = kernels::kArithmeticVersion;
  spec->server_count = static_cast<int>(definition_.server_count());
  for (const v1::TensorSpec& tensor : manifest.tensors())
    if (absl::Status status = AddTensor(tensor, spec.get()); !status.ok()) return status;
  first_shard_.push_back(static_cast<int32_t>(spec->shards.size()));
  if (absl::Status status = AddPlacement(spec.get()); !status.ok()) return status;
  group_.assign(tensors_.size(), -1);
  for (int g = 0; g < definition_.optimizer().groups_size(); ++g) {
    for (uint32_t t : definition_.optimizer().groups(g).tensors()) {
      if (t >= group_.size())
        return BadRequest(
            "tensors", absl::StrCat(t), absl::StrCat(group_.size() - 1),
            absl::StrCat("group ", g, " names tensor number ", t, " of ", group_.size()));
      group_[t] = g;
    }
  }
  spec_ = std::move(spec);
  return absl::OkStatus();
}

absl::Status JobModel::AddTensor(const v1::TensorSpec& wire, step::JobSpec* spec) {
  if (absl::Status status = ValidateTensorSpec(wire); !status.ok()) return status;
  const auto index = static_cast<uint32_t>(tensors_.size());
  Tensor tensor{wire.name(),
                wire.kind() == v1::TENSOR_KIND_PARAMETER,
                ShapeOf(wire),
                wire.dtype(),
                *ElementCount(ShapeOf(wire)),
                wire.may_be_unset()};
  std::vector<std::string> names(wire.tied_names().begin(), wire.tied_names().end());
  names.push_back(wire.name());
  for (const std::string& name : names)
    if (!by_name_.emplace(name, index).second)
      return BadRequest("name", name, "", absl::StrCat("tensor name '", name, "' is given twice"));
  if (tensor.is_parameter) parameter_count_ += tensor.element_count;
  spec->tensors.push_back({tensor.name, tensor.shape, tensor.is_parameter, tensor.may_be_unset});
  first_shard_.push_back(static_cast<int32_t>(spec->shards.size()));
  const uint64_t shards = ShardCount(tensor.element_count, shard_elements());
  if (shards > kMaxShards - spec->shards.size()) {
    return BadRequest(
        "shard_elements", absl::StrCat(shard_elements()), "",
        absl::StrCat("the job has more than ", kMaxShards, " shards of ", shard_elements(),
                     " elements, counted to tensor '", wire.name(), "': make them larger"));
  }
  for (uint64_t s = 0; s < shards; ++s)
    spec->shards.push_back({static_cast<step::TensorId>(index),
                            ShardRange(s, tensor.element_count, shard_elements()),
                            {}});
  tensors_.push_back(std::move(tensor));
  return absl::OkStatus();
}

absl::Status JobModel::AddPlacement(step::JobSpec* spec) {
  run_of_shard_.assign(spec->shards.size(), -1);
  for (int r = 0; r < definition_.runs_size(); ++r) {
    const v1::PlacementRun& run = definition_.runs(r);
    const bool is_known = run.tensor() < tensors_.size() && run.servers_size() == 1;
    const uint64_t count = is_known ? ShardCountOf(run.tensor()) : 0;
    if (run.first_shard() >= count || run.shard_count() > count - run.first_shard()) {
      return absl::InvalidArgumentError(
          absl::StrCat("placement run ", r, " does not fit the manifest"));
    }
    for (uint64_t s = 0; s < run.shard_count(); ++s) {
      const int32_t shard =
          first_shard_[run.tensor()] + static_cast<int32_t>(run.first_shard() + s);
      if (run_of_shard_[shard] >= 0)
        return absl::InvalidArgumentError(absl::StrCat("placement runs ", run_of_shard_[shard],
                                                       " and ", r, " have shard ", shard));
      spec->shards[shard].copies = {static_cast<int32_t>(run.servers(0))};
      run_of_shard_[shard] = r;
    }
  }
  // A definition without runs is one that server/cluster/placement.h has yet to place.
  return definition_.runs_size() > 0 ? step::ValidateJobSpec(*spec) : absl::OkStatus();
}

absl::StatusOr<uint32_t> JobModel::FindTensor(absl::string_view name) const {
  const auto it = by_name_.find(name);
  if (it != by_name_.end()) return it->second;
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::UNKNOWN_TENSOR);
  detail.set_job(job());
  detail.set_tensor(Beginning({name.data(), name.size()}, kMaxNameBytes));
  return MakeError(absl::StatusCode::kNotFound,
                   absl::StrCat("job '", job(), "' has no tensor '", detail.tensor(), "'"), detail);
}

bool JobModel::LiesWhole(uint32_t tensor) const {
  for (int32_t shard = first_shard_[tensor] + 1; shard < first_shard_[tensor + 1]; ++shard)
    if (Owner(shard) != Owner(shard - 1)) return false;
  return true;
}

const std::string& JobModel::ReasonOf(int32_t shard) const {
  return definition_.runs(run_of_shard_[shard]).reason();
}

OwnedShards JobModel::LayoutFor(int server) const {
  OwnedShards layout{job(), tensors_, {}};
  for (uint32_t t = 0; t < tensors_.size(); ++t) {
    for (int32_t id = first_shard_[t]; id < first_shard_[t + 1]; ++id) {
      if (Owner(id) != server) continue;
      const uint64_t index = static_cast<uint64_t>(id - first_shard_[t]);
      layout.shards.push_back(
          {id, t, index, ShardRange(index, tensors_[t].element_count, shard_elements())});
    }
  }
  return layout;
}

std::vector<TensorOptimizer> JobModel::Optimizers() const {
  std::vector<TensorOptimizer> optimizers(tensors_.size());
  for (const v1::OptimizerGroup& group : definition_.optimizer().groups()) {
    const std::set<uint32_t> fp32(group.fp32_tensors().begin(), group.fp32_tensors().end());
    const TensorOptimizer wanted = OptimizerOf(group);
    for (uint32_t t : group.tensors()) {
      optimizers[t] = wanted;
      optimizers[t].state = StateFormatOf(tensors_[t], wanted.state, fp32.contains(t));
    }
  }
  return optimizers;
}

}  // namespace orlop::server
