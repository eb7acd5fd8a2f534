// One push, 7 of 8 (ARCHITECTURE.md); next: kernels/step.cc
// The apply: version s+1 of a shard from version s and what is staged, as one unit.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "kernels/optimizer.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/shards/shard.h"

namespace orlop::server {
namespace {

constexpr std::chrono::milliseconds kRoomPoll(5);

// Gradients of zeros, of any shard: pages that were never written take no memory.
const void* Zeros() {
  static const void* const zeros = mmap(nullptr, 2 * kMaxShardElements, PROT_READ,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return zeros;
}

// The shard's part of the averages of its tensor's rows or columns.
void CopyAverages(absl::Span<const float> averages, const SlotFormat& format, Buffer* to) {
  std::memcpy(to->data(), averages.data() + format.axis_begin, format.axis_count * sizeof(float));
}

}  // namespace

kernels::RangeStep RangeStepOf(const ShardUpdate& update, const TensorOptimizer& optimizer,
                               const OwnedShard& shard, kernels::TypedSpan gradient,
                               WorkingSlots* slots) {
  kernels::RangeStep step;
  step.optimizer = optimizer.optimizer;
  step.scalars = update.scalars.span();
  step.gradient = gradient;
  step.new_weight = slots->as<uint16_t>(Slot::kWeight).data();
  step.weight =
      slots->old_weight ? std::as_const(*slots->old_weight).as<uint16_t>().data() : step.new_weight;
  step.remainder = slots->as<uint8_t>(Slot::kRemainder).data();
  step.master = optimizer.master;
  step.format = optimizer.state;
  step.rounding = optimizer.rounding;
  for (size_t i = 0; i < optimizer.optimizer->states.size(); ++i) {
    const Slot values = StateSlot(optimizer.optimizer->states[i].name);
    step.states[i] = {slots->as<uint8_t>(values).data(),
                      slots->as<float>(static_cast<Slot>(static_cast<size_t>(values) + 1)).data()};
  }
  step.random = update.random;
  step.first_block = shard.range.begin / kernels::kQuantBlock;
  if (update.look) update.look->pass->Finish(shard.range.begin, &step);
  return step;
}

absl::StatusOr<StagedGradient> StagedGradientOf(Shard* shard) {
  StagedGradient staged;
  {
    MutexLock lock(&shard->mutex);
    staged.stage = shard->gradient;
  }
  staged.absent = true;
  if (staged.stage) {
    MutexLock lock(&staged.stage->mutex);
    const GradientStage& stage = *staged.stage;
    const bool came = std::ranges::any_of(stage.pieces, &GradientPiece::stored);
    if (came && !stage.result)
      return ShardError(absl::StatusCode::kFailedPrecondition, *shard, "no gradient is staged");
    staged.absent = !came;
    if (came) staged.values = {KernelDType(stage.dtype), stage.whole->data(), shard->count()};
  }
  if (staged.absent) staged.values = {kernels::DType::kBF16, Zeros(), shard->count()};
  return staged;
}

absl::Status ShardStore::Apply(int32_t id, const ShardUpdate& update) {
  auto found = Find(id);
  if (!found.ok()) return found.status();
  Shard* shard = *found;
  shard->Acquire();
  absl::Status status;
  if (update.loads >= 0 && update.loads != loads_) {
    shard->Release();
    return absl::AbortedError("the shard was restored meanwhile");
  }
  {
    MutexLock lock(&shard->mutex);
    const bool follows = update.kind == ShardUpdate::Kind::kLoad
                             ? update.step > shard->version
                             : update.step == shard->version + 1;
    if (!follows || (shard->version < 0 && update.kind != ShardUpdate::Kind::kLoad))
      status = ShardError(
          absl::StatusCode::kFailedPrecondition, *shard,
          absl::StrCat("cannot make version ", update.step, " of version ", shard->version),
          v1::ErrorDetail::WRONG_STEP);
    shard->applying = status.ok();
  }
  if (status.ok() && update.kind == ShardUpdate::Kind::kLoad) status = ApplyLoad(shard, update);
  if (status.ok() && update.kind == ShardUpdate::Kind::kApply && !update.untouched)
    status = ApplyGradient(shard, update);
  if (status.ok()) {
    MutexLock lock(&shard->mutex);
    shard->version = update.step;
  }
  if (status.ok()) DropStaged(id);
  shard->Release();
  return status;
}

// A spilled slot's bytes read back; null for the initial ones; else what is in memory.
absl::StatusOr<BufferPtr> ShardStore::Contents(const Shard& shard, Slot slot,
                                               const SlotState& state) {
  if (state.data || !state.spilled) return state.data;
  auto buffer = tiers_->NewBuffer({Tier::kDram, layout_.job, "messages"}, state.spilled->bytes);
  if (!buffer.ok()) return buffer.status();
  absl::Status restored = tiers_->Restore(shard.Key(layout_.job, slot), *state.spilled,
                                          {(*buffer)->data(), (*buffer)->size()});
  if (!restored.ok()) return restored;
  return buffer;
}

WindowLease::WindowLease(Mutex* mutex, CondVar* free, bool* busy)
    : mutex_(mutex), free_(free), busy_(busy) {
  MutexLock lock(mutex_);
  while (*busy_) free_->Wait(mutex_);
  *busy_ = true;
}
WindowLease::~WindowLease() {
  MutexLock lock(mutex_);
  *busy_ = false;
  free_->Signal();
}

// A spill that could not be finished owes the window to the next apply.
absl::Status ShardStore::EnsureWindow(uint64_t bytes) {
  {
    MutexLock lock(&mutex_);
    if (window_.reserved_bytes() >= bytes) return absl::OkStatus();
  }
  if (OpenWindow().ok()) return absl::OkStatus();
  // Other jobs' cold slots make room; what somebody else takes first is asked for again with the
  // next try.
  (void)tiers_->Reserve({Tier::kDram, layout_.job, "apply"}, WindowBytes());
  return OpenWindow();
}

// The window, if the shard has slots on disk.
absl::Status ShardStore::LeaseWindow(const Shard& shard,
                                     std::optional<WindowLease>* lease) NO_THREAD_SAFETY_ANALYSIS {
  uint64_t bytes = 0;
  for (const SlotState& slot : shard.slots)
    if (slot.format.exists() && slot.tier == Tier::kNvme)
      bytes += Buffer::Footprint(slot.format.Bytes(shard.count()));
  if (bytes == 0) return absl::OkStatus();
  lease->emplace(&mutex_, &window_free_, &window_busy_);
  absl::Status room = EnsureWindow(bytes);
  return room.ok() ? room : Annotated(room, shard.Name());
}

// A slot without bytes in memory: its first ones in its own room, or those on disk in the window.
absl::StatusOr<BufferPtr> ShardStore::BringSlot(Shard* shard, Slot slot) NO_THREAD_SAFETY_ANALYSIS {
  SlotState& state = shard->slots[static_cast<size_t>(slot)];
  const uint64_t bytes = state.format.Bytes(shard->count());
  Reservation* const room = state.tier == Tier::kDram ? &state.room : &window_;
  auto buffer = InitialBuffer(state.format, bytes, room);
  if (room == &window_ && absl::IsResourceExhausted(buffer.status())) {
    WriteBackStranded();
    buffer = InitialBuffer(state.format, bytes, room);
  }
  if (!buffer.ok()) return Annotated(buffer.status(), shard->Name());
  if (state.spilled)
    if (absl::Status restored = tiers_->Restore(shard->Key(layout_.job, slot), *state.spilled,
                                                {(*buffer)->data(), bytes});
        !restored.ok())
      return restored;
  return buffer;
}

// While `busy`, slots change by this thread alone, so that they are read without the lock.
absl::Status ShardStore::ApplyGradient(Shard* shard,
                                       const ShardUpdate& update) NO_THREAD_SAFETY_ANALYSIS {
  const TensorOptimizer& optimizer = optimizers_[shard->info.tensor];
  if (shard->expected.empty()) return absl::OkStatus();  // it takes no gradients
  const auto gradient = StagedGradientOf(shard);
  if (!gradient.ok()) return gradient.status();
  if (optimizer.frozen() || update.scalars.count != optimizer.optimizer->scalar_count)
    return absl::InvalidArgumentError("the decision's scalars are not of this tensor's optimizer");
  if (gradient->absent && optimizer.optimizer->takes_weights)
    return absl::OkStatus();  // zeros would be its new weights
  if (optimizer.optimizer->scope != kernels::Scope::kElement && !update.look)
    return absl::InvalidArgumentError("the tensor was not looked at");
  const kernels::StepScalars& scalars = update.look ? update.look->pass->scalars() : update.scalars;
  std::optional<WindowLease> lease;
  if (absl::Status leased = LeaseWindow(*shard, &lease); !leased.ok()) return leased;

  WorkingSlots slots;
  for (size_t i = 0; i < kStoredSlotCount; ++i) {
    SlotState& state = shard->slots[i];
    const Slot slot = static_cast<Slot>(i);
    if (!state.format.exists()) continue;
    if (slot >= kFirstState && state.format.axis == SlotFormat::Axis::kElements &&
        !optimizer.optimizer->KeepsState(scalars.span()))
      continue;
    const uint64_t bytes = state.format.Bytes(shard->count());
    const bool held = state.data && state.data.use_count() > 1;
    if (state.data && !held) {
      slots.buffers[i] = state.data;
      continue;
    }
    absl::StatusOr<BufferPtr> buffer;
    if (held) {
      // A slow reader keeps the old bytes. If there is no room for fresh ones, wait until it is
      // done: its call ends when nothing is taken (server/lanes/stall_watch.h).
      Reservation room;
      for (;;) {
        auto reserved =
            tiers_->Reserve({Tier::kDram, layout_.job, SlotName(slot)}, Buffer::Footprint(bytes));
        if (reserved.ok()) {
          room = *std::move(reserved);
          break;
        }
        if (state.data.use_count() == 1) break;
        Mutex never;
        CondVar pause;
        MutexLock lock(&never);
        pause.WaitUntil(&never, std::chrono::steady_clock::now() + kRoomPoll);
      }
      if (room.reserved_bytes() == 0) {
        slots.buffers[i] = state.data;
        continue;
      }
      buffer = room.Allocate(bytes);
      if (!buffer.ok()) return Annotated(buffer.status(), shard->Name());
      if (slot == Slot::kWeight)
        slots.old_weight = state.data;
      else
        std::memcpy((*buffer)->data(), state.data->data(), bytes);
      slots.rooms[i] = std::move(room);
    } else {
      buffer = BringSlot(shard, slot);
    }
    if (!buffer.ok()) return buffer.status();
    slots.buffers[i] = *std::move(buffer);
  }

  const absl::Status run =
      kernels::Step(RangeStepOf(update, optimizer, shard->info, gradient->values, &slots));
  if (!run.ok()) return Annotated(run, shard->Name());
  for (const Slot slot : {RowSlot(), ColumnSlot()}) {
    const size_t i = static_cast<size_t>(slot);
    if (!slots.buffers[i] || !update.look) continue;
    const kernels::PassMemory& found = update.look->pass->memory();
    CopyAverages(slot == RowSlot() ? found.rows : found.columns, shard->slots[i].format,
                 slots.buffers[i].get());
  }

  for (size_t i = 0; i < kStoredSlotCount; ++i) {
    SlotState& state = shard->slots[i];
    const Slot slot = static_cast<Slot>(i);
    if (!slots.buffers[i]) continue;
    std::optional<SpilledSlot> written;
    if (state.tier == Tier::kNvme) {
      auto spilled =
          tiers_->Spill(shard->Key(layout_.job, slot), update.step, slots.buffers[i]->bytes(),
                        state.spilled ? &*state.spilled : nullptr);
      if (spilled.ok()) written = *spilled;
    }
    MutexLock lock(&shard->mutex);
    if (written) {
      state.spilled = written;
      state.data.reset();
      (void)state.room.SetUsed(written->bytes);
    } else {  // in memory, or the disk refuses: committed bytes then stay in memory until it takes
              // them
      state.data = std::move(slots.buffers[i]);
      if (state.tier == Tier::kDram && slots.rooms[i].reserved_bytes() > 0)
        state.room = std::move(slots.rooms[i]);
    }
  }
  return absl::OkStatus();
}

// Slots that a failing disk left in the window go out now, if it works again. Those of a shard that
// is busy (the caller's too) stay.
void ShardStore::WriteBackStranded() NO_THREAD_SAFETY_ANALYSIS {
  for (auto& shard : shards_) {
    {
      MutexLock lock(&shard->mutex);
      if (shard->busy) continue;
      shard->busy = true;
    }
    for (size_t i = 0; i < kStoredSlotCount; ++i) {
      SlotState& state = shard->slots[i];
      if (state.tier != Tier::kNvme || !state.data) continue;
      auto written = tiers_->Spill(shard->Key(layout_.job, static_cast<Slot>(i)), shard->version,
                                   state.data->bytes(), state.spilled ? &*state.spilled : nullptr);
      if (!written.ok()) break;
      MutexLock lock(&shard->mutex);
      state.spilled = *written;
      state.data.reset();
      (void)state.room.SetUsed(written->bytes);
    }
    shard->Release();
  }
}

absl::Status ShardStore::ApplyLoad(Shard* shard,
                                   const ShardUpdate& update) NO_THREAD_SAFETY_ANALYSIS {
  const std::shared_ptr<LoadStage> load = shard->load;
  if (!load) {
    if (shard->version >= 0) return absl::OkStatus();
    return ShardError(absl::StatusCode::kFailedPrecondition, *shard,
                      "the first LOAD sets nothing here", v1::ErrorDetail::LOADING);
  }
  if (!load->result)
    return ShardError(absl::StatusCode::kFailedPrecondition, *shard, "the LOAD is not staged");
  for (size_t i = 0; i < kStoredSlotCount; ++i) {
    LoadPlane& plane = load->planes[i];
    SlotState& state = shard->slots[i];
    if (!plane.data && !plane.spilled) continue;
    const SlotKey key = shard->Key(layout_.job, static_cast<Slot>(i));
    std::optional<SpilledSlot> written = std::exchange(plane.spilled, std::nullopt);
    const std::optional<SpilledSlot> old = state.spilled;
    if (!written && state.tier == Tier::kNvme)
      if (auto spilled = tiers_->Spill(key, update.step, plane.data->bytes(), nullptr);
          spilled.ok())
        written = *spilled;
    {
      MutexLock lock(&shard->mutex);
      state.spilled = written;
      if (written) {
        state.data.reset();
        plane.data.reset();
        (void)state.room.SetUsed(written->bytes);
      } else {  // in memory, or the disk refuses: committed bytes then stay in memory until it
                // takes them
        state.data = std::move(plane.data);
        if (state.tier == Tier::kDram && plane.room.reserved_bytes() > 0)
          state.room = std::move(plane.room);
      }
    }
    if (old)
      (void)tiers_->Erase(key, *old);  // a failed erase leaves bytes that the next start removes
  }
  return absl::OkStatus();
}

}  // namespace orlop::server
