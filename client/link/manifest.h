// The client's copy of a job's manifest: it finds tensors by index and by name, and computes their
// shards.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/types.pb.h"

namespace orlop::client {

// The arguments of CreateJob. Lists may have any length; the client sends them in pages.
struct JobSpec {
  std::string job;
  std::vector<v1::TensorSpec> tensors;
  // A multiple of 256. 0: 2^22.
  uint64_t shard_elements = 0;
  // Seed of stochastic rounding.
  uint64_t seed = 0;
  // The level the job requires. UNSPECIFIED: the strongest that the servers offer.
  v1::Durability durability = v1::DURABILITY_UNSPECIFIED;
  // If true, a commit that reaches a lower level passes and reports the level reached.
  bool allow_degraded = false;
};

// Immutable once built, so any thread may read it. An `index` argument must be below size(); it is
// not checked.
class Manifest {
 public:
  Manifest() = default;
  // Builds the manifest from the tensors in the order of their indexes. If `shard_elements` is 0,
  // it becomes kDefaultShardElements (2^22).
  //   Status  InvalidArgument for a name or tied name that occurs twice, or for a shape that
  //           ElementCount (base/box.h) refuses. A server sends neither.
  static absl::StatusOr<Manifest> Build(std::vector<v1::TensorSpec> tensors,
                                        uint64_t shard_elements, uint64_t seed,
                                        v1::Durability durability);

  const std::vector<v1::TensorSpec>& tensors() const { return tensors_; }
  const v1::TensorSpec& tensor(uint32_t index) const { return tensors_[index]; }
  uint32_t size() const { return static_cast<uint32_t>(tensors_.size()); }
  // Returns the index of the tensor whose name or tied name is `name`.
  //   Status  NotFound (UNKNOWN_TENSOR), with the name.
  absl::StatusOr<uint32_t> Find(std::string_view name) const;
  uint64_t element_count(uint32_t index) const { return element_counts_[index]; }
  // The number of shards of a tensor, at least 1.
  uint64_t shard_count(uint32_t index) const;
  uint64_t shard_elements() const { return shard_elements_; }
  uint64_t seed() const { return seed_; }
  // The level the servers apply. It may be lower than the level asked for if allow_degraded was
  // set.
  v1::Durability durability() const { return durability_; }

 private:
  std::vector<v1::TensorSpec> tensors_;
  std::vector<uint64_t> element_counts_;
  std::unordered_map<std::string, uint32_t> index_of_name_;
  uint64_t shard_elements_ = 0;
  uint64_t seed_ = 0;
  v1::Durability durability_ = v1::DURABILITY_UNSPECIFIED;
};

}  // namespace orlop::client
