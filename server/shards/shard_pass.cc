// The first phase of a step of a tensor whose optimizer looks at all of it: its shards are read in
// order, and nothing is changed.
#include <algorithm>
#include <utility>

#include "proto/status.h"
#include "server/shards/shard.h"

namespace orlop::server {
// Factored tensors are looked at side by side, matrices one after another.
uint64_t ShardStore::LookBytes() const {
  uint64_t factored = 0, matrix = 0;
  for (const auto& shard : shards_) {
    const TensorOptimizer& optimizer = optimizers_[shard->info.tensor];
    if (optimizer.frozen() || shard->info.index > 0) continue;
    const uint64_t bytes = Buffer::Footprint(kernels::PassMemory::Bytes(
        *optimizer.optimizer, kernels::MatrixShape::Of(shard->tensor->shape)));
    if (optimizer.optimizer->scope == kernels::Scope::kMatrix)
      matrix = std::max(matrix, bytes);
    else
      factored += bytes;
  }
  return factored + matrix;
}

// A committed step must not fail for lack of memory: the room of its looks is kept.
absl::Status ShardStore::ReserveLook() {
  const uint64_t bytes = LookBytes();
  Reservation before;
  {
    MutexLock lock(&mutex_);
    if (look_.reserved_bytes() == bytes) return absl::OkStatus();
    before = std::exchange(look_, Reservation());
  }
  before = Reservation();  // gives its room back first
  if (bytes == 0) return absl::OkStatus();
  auto reserved = tiers_->Reserve({Tier::kDram, layout_.job, "apply"}, bytes);
  if (!reserved.ok()) return reserved.status();
  MutexLock lock(&mutex_);
  look_ = *std::move(reserved);
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const TensorLook>> ShardStore::Look(uint32_t tensor,
                                                                   const ShardUpdate& update) {
  const kernels::Optimizer* optimizer = optimizers_[tensor].optimizer;
  if (optimizer == nullptr || update.scalars.count != optimizer->scalar_count)
    return absl::InvalidArgumentError("the decision's scalars are not of this tensor's optimizer");
  const auto shape = kernels::MatrixShape::Of(layout_.tensors[tensor].shape);
  std::vector<Shard*> shards;
  for (const auto& shard : shards_)
    if (shard->info.tensor == tensor) shards.push_back(shard.get());

  auto look = std::make_shared<TensorLook>();
  if (const uint64_t bytes = kernels::PassMemory::Bytes(*optimizer, shape); bytes > 0) {
    MutexLock lock(&mutex_);
    auto buffer = look_.Allocate(bytes);
    if (!buffer.ok()) return buffer.status();
    look->memory = *std::move(buffer);
  }
  const kernels::PassMemory memory(*optimizer, shape,
                                   look->memory ? look->memory->data() : nullptr);
  for (Shard* shard : shards) {
    if (memory.rows.empty()) break;
    absl::Status status = LookForAverages(shard, memory.rows, memory.columns);
    if (!status.ok()) return status;
  }
  look->pass.emplace(*optimizer, shape, update.scalars, memory);
  for (int round = 0; round < look->pass->rounds(); ++round) {
    for (Shard* shard : shards) {
      shard->Acquire();
      absl::Status status = LookAtShard(shard, update, look.get());
      shard->Release();
      if (!status.ok()) return status;
    }
    look->pass->EndRound();
  }
  return look;
}

// Each average from the shard that has its row's or column's first element.
absl::Status ShardStore::LookForAverages(Shard* shard, absl::Span<float> rows,
                                         absl::Span<float> columns) NO_THREAD_SAFETY_ANALYSIS {
  shard->Acquire();
  absl::Status status;
  for (const Slot slot : {RowSlot(), ColumnSlot()}) {
    const SlotState& state = shard->slots[static_cast<size_t>(slot)];
    const SlotFormat& format = state.format;
    auto contents = Contents(*shard, slot, state);
    status.Update(contents.status());
    if (!status.ok() || *contents == nullptr) continue;  // fresh: zeros
    const absl::Span<const float> own = std::as_const(**contents).as<float>();
    for (uint64_t i = 0; i < format.axis_count; ++i) {
      const uint64_t index = format.axis_begin + i;
      const uint64_t first =
          slot == RowSlot()
              ? index * format.columns
              : index / format.columns * format.columns * format.rows + index % format.columns;
      if (first >= shard->info.range.begin && first < shard->info.range.end)
        (slot == RowSlot() ? rows : columns)[index] = own[i];
    }
  }
  shard->Release();
  return status;
}

// The caller has acquired the shard.
absl::Status ShardStore::LookAtShard(Shard* shard, const ShardUpdate& update,
                                     TensorLook* look) NO_THREAD_SAFETY_ANALYSIS {
  if (update.step != shard->version + 1)
    return ShardError(
        absl::StatusCode::kFailedPrecondition, *shard,
        absl::StrCat("cannot look at version ", shard->version, " for version ", update.step),
        v1::ErrorDetail::WRONG_STEP);
  const auto gradient = StagedGradientOf(shard);
  if (!gradient.ok()) return gradient.status();
  std::optional<WindowLease> lease;
  WorkingSlots slots;
  if (look->pass->reads_slots()) {
    if (absl::Status leased = LeaseWindow(*shard, &lease); !leased.ok()) return leased;
    for (size_t i = 0; i < kStoredSlotCount; ++i) {
      SlotState& state = shard->slots[i];
      if (!state.format.exists() || state.format.axis != SlotFormat::Axis::kElements) continue;
      slots.buffers[i] = state.data;
      if (state.data) continue;
      auto buffer = BringSlot(shard, static_cast<Slot>(i));
      if (!buffer.ok()) return buffer.status();
      slots.buffers[i] = *buffer;
      if (state.tier == Tier::kNvme) continue;
      MutexLock lock(&shard->mutex);
      state.data = *std::move(buffer);
    }
  }
  ShardUpdate plain = update;
  plain.look = nullptr;  // the pass gives its own scalars and input
  return look->pass->Add(
      RangeStepOf(plain, optimizers_[shard->info.tensor], shard->info, gradient->values, &slots),
      shard->info.range.begin);
}

}  // namespace orlop::server
