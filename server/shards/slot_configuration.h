// Changes the optimizer slots of a job's shards from one optimizer configuration to another, or
// back. Functions take one optimizer for each tensor.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "server/job/slots.h"
#include "server/shards/shard.h"
#include "server/tiers/residency.h"

namespace orlop::server {

// Returns the format that a configuration gives a slot of a shard.
SlotFormat ConfiguredFormat(const Shard& shard, const std::vector<TensorOptimizer>& optimizers,
                            Slot slot);
// Gives a slot its format and no room: nothing has set the tensor (Tensor::may_be_unset).
void LeaveUnplaced(Shard* shard, Slot slot, const SlotFormat& format);
// Returns the memory in bytes that all slots of all shards take in a configuration. The weights of
// tensors that are unset take none.
uint64_t ConfiguredBytes(const std::vector<std::unique_ptr<Shard>>& shards,
                         const std::vector<TensorOptimizer>& optimizers);

// One change of configuration: Place, then Finish, or Undo if Place has failed. Place and Undo wait
// for whoever holds a slot that changes, and for the disk. Not thread-safe.
class SlotChange {
 public:
  // `shards` and `residency` must outlive the change.
  SlotChange(const std::vector<std::unique_ptr<Shard>>* shards, Residency* residency)
      : shards_(shards), residency_(residency) {}

  // Replaces the slots whose format changes by empty ones. The other slots keep room and contents.
  //   Status  ResourceExhausted: part of the slots are replaced; call Undo, or destroy the shards
  absl::Status Place(const std::vector<TensorOptimizer>& optimizers);
  // Puts back the slots of the configuration `before`, with their contents.
  //   Status  ResourceExhausted: another job has taken the memory meanwhile
  absl::Status Undo(const std::vector<TensorOptimizer>& before);
  // Erases the contents that a successful Place has replaced. Waits for the disk.
  void Finish();

 private:
  struct Replaced {
    Shard* shard;
    Slot slot;
    SlotState state;
  };

  const std::vector<std::unique_ptr<Shard>>* const shards_;
  Residency* const residency_;
  // The slots that had contents before Place.
  std::vector<Replaced> replaced_;
};

}  // namespace orlop::server
