// One epoch's placement map, ready for lookups.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/link/manifest.h"
#include "orlop/v1/types.pb.h"

namespace orlop::client {

// Immutable: shared between threads as a snapshot.
class Placement {
 public:
  // `map` holds all runs. DataLoss unless every shard of the manifest has exactly one run and a
  // known server.
  static absl::StatusOr<std::shared_ptr<const Placement>> Build(v1::PlacementMap map,
                                                                const Manifest& manifest);

  uint64_t epoch() const { return map_.epoch(); }
  const v1::PlacementMap& map() const { return map_; }
  // Index into map().servers() of the shard's primary.
  uint32_t OwnerOf(uint32_t tensor, uint64_t shard) const {
    return owners_[first_shard_[tensor] + shard];
  }
  const v1::ServerInfo& server(uint32_t index) const {
    return map_.servers(static_cast<int>(index));
  }

 private:
  v1::PlacementMap map_;
  std::vector<uint64_t> first_shard_;  // per tensor, into owners_
  std::vector<uint32_t> owners_;
};

}  // namespace orlop::client
