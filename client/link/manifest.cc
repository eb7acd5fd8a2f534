#include "client/link/manifest.h"

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"

namespace orlop::client {
namespace {

absl::Status AddName(const std::string& name, uint32_t index,
                     std::unordered_map<std::string, uint32_t>* index_of_name) {
  if (index_of_name->emplace(name, index).second) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("manifest has two tensors named ", name));
}

}  // namespace

absl::StatusOr<Manifest> Manifest::Build(std::vector<v1::TensorSpec> tensors,
                                         uint64_t shard_elements, uint64_t seed,
                                         v1::Durability durability) {
  Manifest manifest;
  manifest.tensors_ = std::move(tensors);
  manifest.shard_elements_ = shard_elements == 0 ? kDefaultShardElements : shard_elements;
  manifest.seed_ = seed;
  manifest.durability_ = durability;
  for (uint32_t i = 0; i < manifest.size(); ++i) {
    const v1::TensorSpec& tensor = manifest.tensors_[i];
    absl::StatusOr<uint64_t> count = ElementCount({tensor.shape().begin(), tensor.shape().end()});
    if (!count.ok()) return Annotated(count.status(), absl::StrCat("tensor ", tensor.name()));
    manifest.element_counts_.push_back(*count);
    absl::Status status = AddName(tensor.name(), i, &manifest.index_of_name_);
    for (const std::string& tied : tensor.tied_names())
      if (status.ok()) status = AddName(tied, i, &manifest.index_of_name_);
    if (!status.ok()) return status;
  }
  return manifest;
}

absl::StatusOr<uint32_t> Manifest::Find(std::string_view name) const {
  const auto found = index_of_name_.find(std::string(name));
  if (found != index_of_name_.end()) return found->second;
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::UNKNOWN_TENSOR);
  detail.set_tensor(std::string(name));
  return MakeError(absl::StatusCode::kNotFound,
                   absl::StrCat("the manifest has no tensor named ", std::string(name)), detail);
}

uint64_t Manifest::shard_count(uint32_t index) const {
  return ShardCount(element_counts_[index], shard_elements_);
}

}  // namespace orlop::client
