// One shard: its slots, and what is staged for it.
//   Threads  all methods are safe from any thread. None waits for the disk.
//   Locks    that of the shard is taken before those of its stages, and these before that of its
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

  // Replaces the contribution layout: what is staged is dropped. `pieces`: by rank, then region.
  void Expect(std::vector<ExpectedPiece> pieces) EXCLUDES(mutex);
  bool takes_gradients() const EXCLUDES(mutex);  // some piece is expected

  // The stage of the open attempt; made if there is none.
  std::shared_ptr<GradientStage> OpenGradient(StagingRoom* room) EXCLUDES(mutex);
  // The gradient for a step; see GradientStage::Gradient.
  absl::StatusOr<StagedGradient> Gradient() const EXCLUDES(mutex);
  // The stage of the open LOAD; null: nothing was set.
  std::shared_ptr<LoadStage> Load() const EXCLUDES(mutex);
  void DropStaged() EXCLUDES(mutex);
  bool HasStaged() const EXCLUDES(mutex);         // some piece is being sent or was kept
  std::string StageName() const EXCLUDES(mutex);  // as ShardStatus::stage

  const ShardInfo info;
  SlotHome slots;
  mutable Mutex mutex;
  std::vector<ExpectedPiece> expected GUARDED_BY(mutex);
  std::shared_ptr<GradientStage> gradient GUARDED_BY(mutex);
  std::shared_ptr<LoadStage> load GUARDED_BY(mutex);
};

}  // namespace orlop::server
