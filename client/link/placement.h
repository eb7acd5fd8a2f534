// The placement map of one epoch, indexed for lookups.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/link/manifest.h"
#include "orlop/v1/types.pb.h"

namespace orlop::client {

// Immutable, so threads share it as a snapshot.
class Placement {
 public:
  // `map` must have all runs. Status: DataLoss unless every shard of the manifest has exactly one
  // run, with a known server.
  static absl::StatusOr<std::shared_ptr<const Placement>> Build(v1::PlacementMap map,
                                                                const Manifest& manifest);

  uint64_t epoch() const { return map_.epoch(); }
  const v1::PlacementMap& map() const { return map_; }
  // Returns the index into map().servers() of the server that owns the shard.
  uint32_t OwnerOf(uint32_t tensor, uint64_t shard) const {
    return owners_[first_shard_[tensor] + shard];
  }
  const v1::ServerInfo& server(uint32_t index) const {
    return map_.servers(static_cast<int>(index));
  }

 private:
  v1::PlacementMap map_;
  // For each tensor, the index of its first shard in owners_.
  std::vector<uint64_t> first_shard_;
  std::vector<uint32_t> owners_;
};

}  // namespace orlop::client
