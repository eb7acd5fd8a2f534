// One shard: its slots, and what is staged for its next version.
//   Threads  all methods are safe from any thread. None waits for the disk.
//   Locks    the shard's lock is taken before those of its stages, and these before that of its
//            slots.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/job/contributions.h"
#include "server/shards/gradient_stage.h"
#include "server/shards/load_plan.h"
#include "server/shards/load_stage.h"
#include "server/shards/piece_writer.h"
#include "server/shards/shard_info.h"
#include "server/shards/staging_room.h"
#include "server/tiers/slot_home.h"

namespace orlop::server {

struct Shard {
  Shard(const ShardInfo& shard, const std::string& job, Tiers* tiers);

  // Replaces the pieces that the contribution layout expects, and drops what is staged. `pieces`
  // are sorted by rank, then region.
  void Expect(std::vector<ExpectedPiece> pieces) EXCLUDES(mutex);
  // Returns whether the tensor may be unset (Tensor::may_be_unset), and nothing has set the shard.
  bool is_unset() const;
  // Returns whether some piece is expected.
  bool takes_gradients() const EXCLUDES(mutex);

  // Returns the stage of the open attempt, and creates it if there is none.
  std::shared_ptr<GradientStage> OpenGradient(StagingRoom* room) EXCLUDES(mutex);
  // Returns the gradient for a step, zeros if there is no stage. Status as GradientStage::Gradient.
  absl::StatusOr<StagedGradient> Gradient() const EXCLUDES(mutex);
  // Returns the stage of the open LOAD; null if nothing was set.
  std::shared_ptr<LoadStage> Load() const EXCLUDES(mutex);
  void DropStaged() EXCLUDES(mutex);
  void DropLoad() EXCLUDES(mutex);
  // Returns whether some piece is being sent or was kept.
  bool HasStaged() const EXCLUDES(mutex);
  // Returns ShardStatus::stage (shard_store.h).
  std::string StageName() const EXCLUDES(mutex);

  const ShardInfo info;
  SlotHome slots;
  mutable Mutex mutex;
  std::vector<ExpectedPiece> expected GUARDED_BY(mutex);
  std::shared_ptr<GradientStage> gradient GUARDED_BY(mutex);
  std::shared_ptr<LoadStage> load GUARDED_BY(mutex);
};

}  // namespace orlop::server
