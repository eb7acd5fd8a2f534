// A job's manifest as the client holds it: tensors by index and by name, and how they are cut into
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

// What CreateJob needs. Lists of any length: paged by the client.
struct JobSpec {
  std::string job;
  std::vector<v1::TensorSpec> tensors;
  uint64_t shard_elements = 0;  // multiple of 256; 0: 2^22
  uint64_t seed = 0;            // of stochastic rounding
  v1::Durability durability = v1::DURABILITY_UNSPECIFIED;
  bool allow_degraded = false;
};

// Immutable once built, so any thread may read it.
class Manifest {
 public:
  Manifest() = default;
  // Statuses: InvalidArgument for a repeated name or a shape whose product overflows (a server
  // would not send one).
  static absl::StatusOr<Manifest> Build(std::vector<v1::TensorSpec> tensors,
                                        uint64_t shard_elements, uint64_t seed,
                                        v1::Durability durability);

  const std::vector<v1::TensorSpec>& tensors() const { return tensors_; }
  const v1::TensorSpec& tensor(uint32_t index) const { return tensors_[index]; }
  uint32_t size() const { return static_cast<uint32_t>(tensors_.size()); }
  // Index of a tensor by any of its names. NotFound names it.
  absl::StatusOr<uint32_t> Find(std::string_view name) const;
  uint64_t element_count(uint32_t index) const { return element_counts_[index]; }
  uint64_t shard_count(uint32_t index) const;  // at least 1
  uint64_t shard_elements() const { return shard_elements_; }
  uint64_t seed() const { return seed_; }
  v1::Durability durability() const { return durability_; }  // in force

 private:
  std::vector<v1::TensorSpec> tensors_;
  std::vector<uint64_t> element_counts_;
  std::unordered_map<std::string, uint32_t> index_of_name_;
  uint64_t shard_elements_ = 0;
  uint64_t seed_ = 0;
  v1::Durability durability_ = v1::DURABILITY_UNSPECIFIED;
};

}  // namespace orlop::client
