#include "server/shards/shard_image.h"

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/gradient_stage.h"
#include "server/shards/load_stage.h"

namespace orlop::server {

std::optional<GradientImage> ShardImage::ReadGradient() const {
  MutexLock lock(&shard_->mutex);
  if (!shard_->gradient) return std::nullopt;
  return shard_->gradient->Image();
}

std::optional<LoadImage> ShardImage::ReadLoad() const {
  const std::shared_ptr<LoadStage> load = shard_->Load();
  if (!load) return std::nullopt;
  return load->Image();
}

absl::StatusOr<BufferPtr> ShardImage::ReadPlane(Slot slot) const {
  const std::shared_ptr<LoadStage> load = shard_->Load();
  return load ? load->ReadPlane(slot) : BufferPtr();
}

absl::StatusOr<BufferPtr> ShardImage::NewSlot(Slot slot) {
  if (!shard_->slots.is_unplaced(slot)) return shard_->slots.Replace(hold_, slot);
  const uint64_t bytes = formats()[SlotIndex(slot)].Bytes(info().count());
  auto room = staging_->Reserve(Buffer::Footprint(bytes));
  if (!room.ok()) return room.status();
  new_room_ = *std::move(room);
  return new_room_.Allocate(bytes);
}

absl::Status ShardImage::InstallGradient(GradientImage image) {
  MutexLock lock(&shard_->mutex);
  auto stage = std::make_shared<GradientStage>(shard_->info, shard_->expected, staging_);
  if (absl::Status installed = stage->Install(std::move(image)); !installed.ok()) return installed;
  shard_->gradient = std::move(stage);
  return absl::OkStatus();
}

absl::Status ShardImage::InstallLoad(LoadImage image,
                                     std::array<BufferPtr, kStoredSlotCount> planes) {
  auto stage = std::make_shared<LoadStage>(shard_->info, &shard_->slots, staging_);
  absl::Status installed = stage->Install(std::move(image), std::move(planes));
  if (!installed.ok()) return installed;
  MutexLock lock(&shard_->mutex);
  shard_->load = std::move(stage);
  return absl::OkStatus();
}

}  // namespace orlop::server
