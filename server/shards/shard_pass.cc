#include "server/shards/shard_pass.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "kernels/optimizer.h"
#include "kernels/tensor_pass.h"
#include "orlop/v1/types.pb.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/shard.h"
#include "server/shards/shard_info.h"
#include "server/shards/shard_update.h"
#include "server/shards/working_slots.h"
#include "server/tiers/job_room.h"
#include "server/tiers/residency.h"
#include "server/tiers/slot_home.h"

namespace orlop::server {
namespace {

// Copies averages over rows or columns from a shard's slot to `averages`, which has those of the
// whole tensor. If several shards have part of a row or column, its average is taken from the shard
// that has its first element.
absl::Status ReadAverages(Shard* shard, Slot slot, absl::Span<float> averages) {
  const SlotHold hold(&shard->slots);
  const SlotFormat format = shard->slots.formats()[SlotIndex(slot)];
  const auto contents = shard->slots.Read(hold, slot);
  if (!contents.ok()) return contents.status();
  if (*contents == nullptr) return absl::OkStatus();  // the averages are still zero
  const absl::Span<const float> own = std::as_const(**contents).as<float>();
  for (uint64_t i = 0; i < format.axis_count; ++i) {
    const uint64_t index = format.axis_begin + i;
    const uint64_t first =
        slot == RowSlot()
            ? index * format.columns
            : index / format.columns * format.columns * format.rows + index % format.columns;
    const Range& range = shard->info.range();
    if (first >= range.begin && first < range.end) averages[index] = own[i];
  }
  return absl::OkStatus();
}

// Adds a shard to the present round of the pass. The shard must have the version before the update.
absl::Status AddShard(Shard* shard, const TensorOptimizer& optimizer, const ShardUpdate& update,
                      Residency* residency, PassResult* found) {
  const SlotHold hold(&shard->slots);
  if (update.step != shard->slots.version() + 1)
    return ShardError(absl::StatusCode::kFailedPrecondition, shard->info,
                      absl::StrCat("cannot pass over version ", shard->slots.version(),
                                   " for version ", update.step),
                      v1::ErrorDetail::WRONG_STEP);
  const auto gradient = shard->Gradient();
  if (!gradient.ok()) return gradient.status();
  WorkingSlots slots(&shard->slots, &hold, residency);
  if (found->pass->reads_slots()) {
    if (absl::Status leased = slots.LeaseWindow(); !leased.ok()) return leased;
    for (size_t i = 0; i < kStoredSlotCount; ++i) {
      const Slot slot = static_cast<Slot>(i);
      const SlotFormat& format = slots.format(slot);
      if (!format.exists() || format.axis != SlotFormat::Axis::kElements) continue;
      if (absl::Status opened = slots.OpenToRead(slot); !opened.ok()) return opened;
    }
  }
  ShardUpdate plain = update;
  plain.pass = nullptr;  // TensorPass::Add sets scalars and input
  return found->pass->Add(slots.StepOf(plain, optimizer, shard->info, gradient->values),
                          shard->info.range().begin);
}

}  // namespace

uint64_t PassBytes(const OwnedShards& owned, const std::vector<TensorOptimizer>& optimizers) {
  uint64_t factored = 0, matrix = 0;
  for (const OwnedShard& shard : owned.shards) {
    const TensorOptimizer& optimizer = optimizers[shard.tensor];
    if (optimizer.frozen() || shard.index > 0) continue;
    const uint64_t bytes = Buffer::Footprint(kernels::PassMemory::Bytes(
        *optimizer.optimizer, kernels::MatrixShape::Of(owned.tensors[shard.tensor].shape)));
    if (optimizer.optimizer->scope == kernels::Scope::kMatrix)
      matrix = std::max(matrix, bytes);
    else
      factored += bytes;
  }
  return factored + matrix;
}

absl::StatusOr<std::shared_ptr<const PassResult>> RunPass(const WholeTensorShards& whole,
                                                          const ShardUpdate& update, JobRoom* room,
                                                          Residency* residency) {
  const kernels::Optimizer* optimizer = whole.optimizer.optimizer;
  if (optimizer == nullptr || update.scalars.count != optimizer->scalar_count)
    return absl::InvalidArgumentError("the decision's scalars are not of this tensor's optimizer");
  const auto shape = kernels::MatrixShape::Of(whole.tensor->shape);
  auto found = std::make_shared<PassResult>();
  if (const uint64_t bytes = kernels::PassMemory::Bytes(*optimizer, shape); bytes > 0) {
    auto buffer = room->Allocate(bytes);
    if (!buffer.ok()) return buffer.status();
    found->memory = *std::move(buffer);
  }
  const kernels::PassMemory memory(*optimizer, shape,
                                   found->memory ? found->memory->data() : nullptr);
  for (Shard* shard : whole.shards) {
    if (memory.rows.empty()) break;
    absl::Status status = ReadAverages(shard, RowSlot(), memory.rows);
    if (status.ok()) status = ReadAverages(shard, ColumnSlot(), memory.columns);
    if (!status.ok()) return status;
  }
  found->pass.emplace(*optimizer, shape, update.scalars, memory);
  for (int round = 0; round < found->pass->rounds(); ++round) {
    for (Shard* shard : whole.shards) {
      absl::Status added = AddShard(shard, whole.optimizer, update, residency, found.get());
      if (!added.ok()) return added;
    }
    found->pass->EndRound();
  }
  return found;
}

}  // namespace orlop::server
