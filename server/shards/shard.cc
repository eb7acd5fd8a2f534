#include "server/shards/shard.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/job/contributions.h"
#include "server/job/slots.h"
#include "server/shards/gradient_stage.h"
#include "server/shards/load_stage.h"
#include "server/shards/shard_info.h"
#include "server/shards/staging_room.h"
#include "server/tiers/slot_home.h"
#include "server/tiers/tier.h"

namespace orlop::server {

Shard::Shard(const ShardInfo& shard, const std::string& job, Tiers* tiers)
    : info(shard),
      slots(tiers, {job, shard.id(), Slot::kWeight, shard.tensor->name}, shard.Name(),
            shard.count()) {}

void Shard::Expect(std::vector<ExpectedPiece> pieces) {
  {
    MutexLock lock(&mutex);
    expected = std::move(pieces);
  }
  DropStaged();
}

bool Shard::is_unset() const {
  bool is_set = !info.tensor->may_be_unset;
  if (!is_set)
    slots.Inspect([&](const SlotHome::View& view) {
      const SlotBytes& weight = view.slots[SlotIndex(Slot::kWeight)].bytes;
      is_set = weight.data || weight.spilled;
    });
  return !is_set;
}
bool Shard::takes_gradients() const {
  MutexLock lock(&mutex);
  return !expected.empty();
}

std::shared_ptr<GradientStage> Shard::OpenGradient(StagingRoom* room) {
  MutexLock lock(&mutex);
  if (!gradient) gradient = std::make_shared<GradientStage>(info, expected, room);
  return gradient;
}

absl::StatusOr<StagedGradient> Shard::Gradient() const {
  std::shared_ptr<GradientStage> stage;
  {
    MutexLock lock(&mutex);
    stage = gradient;
  }
  return stage ? stage->Gradient() : AbsentGradient(info);
}

std::shared_ptr<LoadStage> Shard::Load() const {
  MutexLock lock(&mutex);
  return load;
}

void Shard::DropStaged() {
  std::shared_ptr<GradientStage> dropped;
  {
    MutexLock lock(&mutex);
    dropped = std::exchange(gradient, nullptr);
  }
  if (dropped) dropped->Drop();
  DropLoad();
}

void Shard::DropLoad() {
  std::shared_ptr<LoadStage> dropped;
  {
    MutexLock lock(&mutex);
    dropped = std::exchange(load, nullptr);
  }
  if (dropped) dropped->Drop();
}

bool Shard::HasStaged() const {
  MutexLock lock(&mutex);
  return (gradient && gradient->has_begun()) || (load && load->has_begun());
}

std::string Shard::StageName() const {
  bool is_changing = false;
  slots.Inspect([&](const SlotHome::View& view) { is_changing = view.changing; });
  if (is_changing) return "applying";
  MutexLock lock(&mutex);
  if (gradient) return gradient->Description();
  return load ? load->Description() : "idle";
}

}  // namespace orlop::server
