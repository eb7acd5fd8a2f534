// One push, 7 of 8 (ARCHITECTURE.md); next: kernels/step.cc
#include "server/shards/shard_apply.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/optimizer.h"
#include "kernels/tensor_pass.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/job/slots.h"
#include "server/shards/load_stage.h"
#include "server/shards/shard.h"
#include "server/shards/shard_info.h"
#include "server/shards/shard_update.h"
#include "server/shards/working_slots.h"
#include "server/tiers/slot_home.h"

namespace orlop::server {
namespace {

absl::Status CheckUpdate(const TensorOptimizer& optimizer, const ShardUpdate& update) {
  if (optimizer.frozen() || update.scalars.count != optimizer.optimizer->scalar_count)
    return absl::InvalidArgumentError("the decision's scalars are not of this tensor's optimizer");
  return absl::OkStatus();
}

// For Adafactor: copies the averages over rows and columns, which the pass has computed for the
// tensor, to the slots of the shard.
void CopyAverages(const PassResult& found, WorkingSlots* slots) {
  for (const Slot slot : {RowSlot(), ColumnSlot()}) {
    const absl::Span<float> own = slots->as<float>(slot);
    if (own.empty()) continue;
    const kernels::PassMemory& memory = found.pass->memory();
    const auto& averages = slot == RowSlot() ? memory.rows : memory.columns;
    const SlotFormat& format = slots->format(slot);
    std::copy_n(averages.data() + format.axis_begin, format.axis_count, own.data());
  }
}

}  // namespace

absl::Status ApplyGradient(const Shard& shard, const TensorOptimizer& optimizer,
                           const ShardUpdate& update, WorkingSlots* slots) {
  if (!shard.takes_gradients()) return absl::OkStatus();
  const auto gradient = shard.Gradient();
  if (!gradient.ok()) return gradient.status();
  if (absl::Status valid = CheckUpdate(optimizer, update); !valid.ok()) return valid;
  // This optimizer takes what is pushed as the new weights, which must not become zero.
  if (gradient->absent && optimizer.optimizer->takes_weights) return absl::OkStatus();
  if (optimizer.optimizer->scope != kernels::Scope::kElement && !update.pass)
    return absl::InvalidArgumentError("there was no pass over the tensor");
  const kernels::StepScalars& scalars = update.pass ? update.pass->pass->scalars() : update.scalars;
  if (absl::Status leased = slots->LeaseWindow(); !leased.ok()) return leased;
  for (size_t i = 0; i < kStoredSlotCount; ++i) {
    const Slot slot = static_cast<Slot>(i);
    const SlotFormat& format = slots->format(slot);
    const bool is_kept = slot < kFirstState || format.axis != SlotFormat::Axis::kElements ||
                         optimizer.optimizer->KeepsState(scalars.span());
    if (!format.exists() || !is_kept) continue;
    if (absl::Status opened = slots->OpenToWrite(slot); !opened.ok()) return opened;
  }
  const absl::Status run =
      kernels::Step(slots->StepOf(update, optimizer, shard.info, gradient->values));
  if (!run.ok()) return Annotated(run, shard.info.Name());
  if (update.pass) CopyAverages(*update.pass, slots);
  slots->Keep(update.step);
  return absl::OkStatus();
}

absl::Status ApplyLoad(Shard* shard, const SlotHold& hold, int64_t version) {
  const std::shared_ptr<LoadStage> load = shard->Load();
  if (!load || !load->has_kept()) {
    if (shard->slots.version() >= 0 || shard->info.tensor->may_be_unset) return absl::OkStatus();
    return ShardError(absl::StatusCode::kFailedPrecondition, shard->info,
                      "the first LOAD sets nothing here", v1::ErrorDetail::LOADING);
  }
  auto planes = load->TakePlanes();
  if (!planes.ok()) return planes.status();
  for (size_t i = 0; i < kStoredSlotCount; ++i) {
    LoadPlane& plane = (*planes)[i];
    if (!plane.bytes.data && !plane.bytes.spilled) continue;
    // If the disk refuses, the contents stay in memory until it takes them.
    (void)shard->slots.Keep(hold, static_cast<Slot>(i), version, std::move(plane.bytes),
                            std::move(plane.room));
  }
  return absl::OkStatus();
}

}  // namespace orlop::server
