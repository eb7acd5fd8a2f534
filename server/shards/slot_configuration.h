// Changes the optimizer slots of a job's shards from one configuration to another, or back.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "server/job/slots.h"
#include "server/shards/shard.h"
#include "server/tiers/residency.h"

namespace orlop::server {

// The format that a configuration gives a slot of a shard.
SlotFormat ConfiguredFormat(const Shard& shard, const std::vector<TensorOptimizer>& optimizers,
                            Slot slot);
// The room in memory of all slots of all shards.
uint64_t ConfiguredBytes(const std::vector<std::unique_ptr<Shard>>& shards,
                         const std::vector<TensorOptimizer>& optimizers);

// One change of configuration. Not thread-safe. Waits for whoever holds a slot that changes, and
// for the disk.
class SlotChange {
 public:
  // `shards` and `residency` outlive this.
  SlotChange(const std::vector<std::unique_ptr<Shard>>* shards, Residency* residency)
      : shards_(shards), residency_(residency) {}

  // Replaces the slots whose format changes by empty ones. Slots whose format stays keep room and
  // contents.
  //   Status  ResourceExhausted: Undo or give up the shards
  absl::Status Place(const std::vector<TensorOptimizer>& optimizers);
  // After a refused Place: puts back the slots of the configuration before, with their contents.
  absl::Status Undo(const std::vector<TensorOptimizer>& before);
  // After a Place: erases the contents that it replaced.
  void Finish();

 private:
  struct Replaced {
    Shard* shard;
    Slot slot;
    SlotState state;
  };

  const std::vector<std::unique_ptr<Shard>>* const shards_;
  Residency* const residency_;
  std::vector<Replaced> replaced_;  // had contents
};

}  // namespace orlop::server
