// Life of a job's shards: room for their slots, what goes to disk, and what can be seen. Staging is
// in shard_stage.cc and shard_load.cc, the apply in shard_apply.cc, reading in shard_read.cc.
#include "server/shards/shard_store.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "proto/status.h"
#include "server/shards/shard.h"

namespace orlop::server {
namespace {

constexpr Slot kFirstOptimizerSlot = kFirstState;

uint64_t SlotFootprint(const SlotState& slot, uint64_t count) {
  return slot.format.exists() ? Buffer::Footprint(slot.format.Bytes(count)) : 0;
}

}  // namespace

absl::Status ShardError(absl::StatusCode code, const Shard& shard, const std::string& message,
                        v1::ErrorDetail::Reason reason) {
  v1::ErrorDetail detail;
  detail.set_reason(reason);
  detail.set_tensor(shard.tensor->name);
  detail.set_shard(shard.info.index);
  return MakeError(code, absl::StrCat(shard.Name(), ": ", message), detail);
}

Digest128 DigestOf(absl::Span<const uint8_t> bytes) {
  PieceDigest digest;
  digest.AddLeaves(LeafHashes({reinterpret_cast<const char*>(bytes.data()), bytes.size()}));
  return digest.Finish();
}

absl::StatusOr<BufferPtr> InitialBuffer(const SlotFormat& format, uint64_t bytes,
                                        Reservation* room) {
  auto buffer = room->Allocate(bytes);
  if (buffer.ok() && format.initial_byte != 0)
    std::memset((*buffer)->data(), format.initial_byte, bytes);
  return buffer;
}

ShardStore::ShardStore(OwnedShards layout, Tiers* tiers) : layout_(std::move(layout)), tiers_(tiers) {
  for (const OwnedShard& shard : layout_.shards)
    shards_.push_back(std::make_unique<Shard>(shard, &layout_.tensors[shard.tensor]));
  optimizers_.resize(layout_.tensors.size());
  tiers_->Register(this);
}

ShardStore::~ShardStore() {
  tiers_->Unregister(this);
  for (auto& shard : shards_) {
    MutexLock lock(&shard->mutex);
    for (size_t i = 0; i < kStoredSlotCount;
         ++i)  // a failed erase leaves bytes that the next start removes
      if (shard->slots[i].spilled)
        (void)tiers_->Erase(shard->Key(layout_.job, static_cast<Slot>(i)),
                            *shard->slots[i].spilled);
  }
}

absl::StatusOr<Shard*> ShardStore::Find(int32_t id) const {
  const auto found = std::lower_bound(
      shards_.begin(), shards_.end(), id,
      [](const std::unique_ptr<Shard>& shard, int32_t id) { return shard->info.id < id; });
  if (found == shards_.end() || (*found)->info.id != id)
    return MakeError(absl::StatusCode::kNotFound,
                     absl::StrCat("job '", layout_.job, "': shard id ", id, " is not held here"),
                     v1::ErrorDetail::NOT_OWNER);
  return found->get();
}

absl::StatusOr<std::unique_ptr<ShardStore>> ShardStore::Create(OwnedShards layout, Tiers* tiers) {
  auto store = std::unique_ptr<ShardStore>(new ShardStore(std::move(layout), tiers));
  for (Slot slot : {Slot::kWeight, Slot::kRemainder})
    for (auto& shard : store->shards_) {
      // Until it is known to be frozen, a parameter keeps its exact master.
      TensorOptimizer any;
      any.optimizer = kernels::FindOptimizer("adamw");
      absl::Status placed = store->PlaceSlot(
          shard.get(), slot, FormatOf(*shard->tensor, any, slot, shard->info.range));
      if (!placed.ok()) return store->WithSmallestBudget(placed);
    }
  return store;
}

// In memory while that lasts, then on disk, which needs the room to bring one shard back.
absl::Status ShardStore::PlaceSlot(Shard* shard, Slot slot, SlotFormat format) {
  SlotState state;
  state.format = format;
  if (format.exists()) {
    const Use use{Tier::kDram, layout_.job, SlotName(slot)};
    const uint64_t bytes = Buffer::Footprint(format.Bytes(shard->count()));
    auto room =
        window_open() ? tiers_->accountant().Reserve(use, bytes) : ReserveWithoutOwn(use, bytes);
    if (!room.ok()) {
      if (!tiers_->can_spill()) return room.status();
      {
        MutexLock lock(&shard->mutex);
        shard->slots[static_cast<size_t>(slot)].format = format;  // the window must hold it
      }
      if (absl::Status window = OpenWindow(); !window.ok()) return window;
      room = tiers_->accountant().Reserve({Tier::kNvme, layout_.job, SlotName(slot)},
                                          format.Bytes(shard->count()));
      if (!room.ok()) return room.status();
      state.tier = Tier::kNvme;
    }
    state.room = *std::move(room);
  }
  MutexLock lock(&shard->mutex);
  shard->slots[static_cast<size_t>(slot)] = std::move(state);
  return absl::OkStatus();
}

// Other jobs may spill for this one, but a slot just placed here is not moved for the next.
absl::StatusOr<Reservation> ShardStore::ReserveWithoutOwn(const Use& use, uint64_t bytes) {
  keep_resident_ = true;
  auto room = tiers_->Reserve(use, bytes);
  keep_resident_ = false;
  return room;
}

bool ShardStore::window_open() const {
  MutexLock lock(&mutex_);
  return window_.reserved_bytes() > 0;
}

// Bytes of the largest shard's slots: what one apply of spilled state needs in memory.
uint64_t ShardStore::WindowBytes() const {
  uint64_t largest = 0;
  for (const auto& shard : shards_) {
    MutexLock lock(&shard->mutex);
    uint64_t bytes = 0;
    for (const SlotState& slot : shard->slots) bytes += SlotFootprint(slot, shard->count());
    largest = std::max(largest, bytes);
  }
  return largest;
}

// Where it lies, so that an apply may be using what is there already.
absl::Status ShardStore::GrowWindow(uint64_t bytes) {
  Accountant& accountant = tiers_->accountant();
  MutexLock lock(&mutex_);
  absl::Status disk = accountant.Grow(&spill_window_, {Tier::kNvme, layout_.job, "apply"}, bytes);
  if (!disk.ok()) return disk;
  return accountant.Grow(&window_, {Tier::kDram, layout_.job, "apply"}, bytes);
}

// Reserves the window in memory and on disk, moving own cold slots out if it does not fit beside
// them.
absl::Status ShardStore::OpenWindow() {
  const uint64_t bytes = WindowBytes();
  if (GrowWindow(bytes).ok()) return absl::OkStatus();
  SpillSome(bytes);
  return GrowWindow(bytes);
}

// Without a disk: all slots must fit; with one: the largest shard at least.
absl::Status ShardStore::WithSmallestBudget(const absl::Status& status) const {
  uint64_t own = 0;
  for (const auto& shard : shards_) {
    MutexLock lock(&shard->mutex);
    for (const SlotState& slot : shard->slots)
      own += slot.tier == Tier::kDram ? slot.room.reserved_bytes() : 0;
  }
  uint64_t need = WindowBytes();
  if (!tiers_->can_spill()) {
    need = 0;
    for (const auto& shard : shards_)
      for (size_t i = 0; i < kStoredSlotCount; ++i)
        need += Buffer::Footprint(FormatOf(*shard->tensor, optimizers_[shard->info.tensor],
                                           static_cast<Slot>(i), shard->info.range)
                                      .Bytes(shard->count()));
  }
  const uint64_t others = tiers_->accountant().reserved_bytes(Tier::kDram) - own;
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::BUDGET);
  need += LookBytes();
  detail.set_limit(absl::StrCat(others + need));
  return Annotated(status,
                   absl::StrCat("job '", layout_.job, "' needs a memory budget of at least ",
                                others + need, " bytes"),
                   detail);
}

struct ShardStore::ReplacedSlot {
  Shard* shard;
  Slot slot;
  SlotState state;
};

absl::Status ShardStore::Configure(const std::vector<TensorOptimizer>& optimizers) {
  if (optimizers.size() != layout_.tensors.size())
    return absl::InvalidArgumentError(
        absl::StrCat(optimizers.size(), " optimizers for ", layout_.tensors.size(), " tensors"));
  for (size_t i = 0; i < optimizers.size(); ++i)
    if (!layout_.tensors[i].is_parameter && !optimizers[i].frozen())
      return absl::InvalidArgumentError(absl::StrCat("tensor '", layout_.tensors[i].name,
                                                     "' is a buffer: it takes no optimizer"));
  if (IsConfiguredAs(optimizers)) return absl::OkStatus();
  configuring_ = true;  // from here on nothing new is staged
  const absl::Cleanup finished = [this] { configuring_ = false; };
  for (const auto& shard : shards_)
    if (HasStaged(*shard))
      return ShardError(absl::StatusCode::kFailedPrecondition, *shard,
                        "holds staged pieces of the other optimizer configuration",
                        v1::ErrorDetail::CONFLICT);
  const std::vector<TensorOptimizer> before = std::exchange(optimizers_, optimizers);
  std::vector<ReplacedSlot> replaced;
  absl::Status placed = PlaceOptimizerSlots(&replaced);
  if (!placed.ok()) {
    placed = WithSmallestBudget(placed);
    optimizers_ = before;
    for (ReplacedSlot& old : replaced) {
      (void)TakeSlot(old.shard, old.slot);
      MutexLock lock(&old.shard->mutex);
      old.shard->slots[static_cast<size_t>(old.slot)] = std::move(old.state);
    }
    // What fitted before fits again, as the new slots are gone by then.
    std::vector<ReplacedSlot> none;
    if (absl::Status again = PlaceOptimizerSlots(&none); !again.ok()) return again;
    return placed;
  }
  configured_ = true;
  for (const ReplacedSlot& old : replaced)
    if (old.state.spilled)  // a failed erase leaves bytes that the next start removes
      (void)tiers_->Erase(old.shard->Key(layout_.job, old.slot), *old.state.spilled);
  return absl::OkStatus();
}

bool ShardStore::IsConfiguredAs(const std::vector<TensorOptimizer>& optimizers) const {
  return configured_ && optimizers == optimizers_;
}

bool ShardStore::HasStaged(const Shard& shard) {
  auto begun = [](const auto& piece) { return piece.claimed || piece.stored; };
  MutexLock lock(&shard.mutex);
  if (shard.gradient) {
    MutexLock stage_lock(&shard.gradient->mutex);
    if (std::ranges::any_of(shard.gradient->pieces, begun)) return true;
  }
  if (shard.load) {
    MutexLock stage_lock(&shard.load->mutex);
    if (std::ranges::any_of(shard.load->pieces, begun)) return true;
  }
  return false;
}

// Slots whose format stays keep room and contents. `replaced` gets what had contents.
absl::Status ShardStore::PlaceOptimizerSlots(std::vector<ReplacedSlot>* replaced) {
  auto changes = [&](Shard* shard, Slot slot) {
    MutexLock lock(&shard->mutex);
    return shard->slots[static_cast<size_t>(slot)].format !=
           FormatOf(*shard->tensor, optimizers_[shard->info.tensor], slot, shard->info.range);
  };
  std::vector<std::pair<Shard*, Slot>> empty;
  for (auto& shard : shards_)
    for (size_t i = static_cast<size_t>(Slot::kRemainder); i < kStoredSlotCount; ++i) {
      const Slot slot = static_cast<Slot>(i);
      if (!changes(shard.get(), slot)) continue;
      SlotState old = TakeSlot(shard.get(), slot);
      if (old.data || old.spilled) replaced->push_back({shard.get(), slot, std::move(old)});
      empty.emplace_back(shard.get(), slot);
    }
  for (const auto& [shard, slot] : empty)
    if (absl::Status placed = PlaceSlot(
            shard, slot,
            FormatOf(*shard->tensor, optimizers_[shard->info.tensor], slot, shard->info.range));
        !placed.ok())
      return placed;
  return ReserveLook();
}

// Leaves a slot that does not exist.
SlotState ShardStore::TakeSlot(Shard* shard, Slot slot) {
  shard->Acquire();
  SlotState old;
  {
    MutexLock lock(&shard->mutex);
    std::swap(old, shard->slots[static_cast<size_t>(slot)]);
  }
  shard->Release();
  return old;
}

// ---- Spilling ----

uint64_t ShardStore::SpillCold(uint64_t wanted_bytes) {
  if (keep_resident_) return 0;
  const uint64_t window = WindowBytes();
  uint64_t missing;
  {
    MutexLock lock(&mutex_);
    missing = window - std::min(window, window_.reserved_bytes());
  }
  if (missing == 0) return SpillSome(wanted_bytes);
  if (!SpillPays(missing)) return 0;
  {
    MutexLock lock(&mutex_);
    absl::Status disk =
        tiers_->accountant().Grow(&spill_window_, {Tier::kNvme, layout_.job, "apply"}, window);
    if (!disk.ok()) return 0;
  }
  // The first spill of a job pays for its window too. Where that does not come free, the next spill
  // or apply asks again.
  const uint64_t freed = SpillSome(wanted_bytes + missing);
  return GrowWindow(window).ok() ? freed - std::min(freed, missing) : freed;
}

// A spill is worth its window if more than that lies in memory; where one was made, the window is
// owed.
bool ShardStore::SpillPays(uint64_t window_bytes) const {
  uint64_t resident_bytes = 0;
  for (const auto& shard : shards_) {
    MutexLock lock(&shard->mutex);
    for (const SlotState& slot : shard->slots) {
      if (slot.tier == Tier::kNvme) return true;
      resident_bytes += slot.room.reserved_bytes();
    }
  }
  return resident_bytes > window_bytes;
}

// Access is cyclic, so any fixed resident set hits alike: the last used shards go, which leaves the
// most time to bring them back; weights go last, as every pull wants them.
uint64_t ShardStore::SpillSome(uint64_t wanted_bytes) {
  std::vector<int32_t> order = NextUseOrder();
  std::reverse(order.begin(), order.end());
  uint64_t freed = 0;
  for (const bool weights : {false, true})
    for (int32_t id : order)
      for (size_t i = weights ? 0 : 1; i < (weights ? 1 : kStoredSlotCount); ++i) {
        if (freed >= wanted_bytes) return freed;
        auto bytes = SpillSlot(*Find(id), static_cast<Slot>(i));
        if (!bytes.ok())
          return freed;  // the disk is full or failing: what is in memory stays there
        freed += *bytes;
      }
  return freed;
}

absl::StatusOr<uint64_t> ShardStore::SpillSlot(Shard* shard, Slot slot) {
  BufferPtr data;
  uint64_t bytes;
  int64_t version;
  {
    MutexLock lock(&shard->mutex);
    SlotState& state = shard->slots[static_cast<size_t>(slot)];
    if (shard->busy || !state.format.exists() || state.tier == Tier::kNvme) return 0;
    // What a LOAD is filling, or a reader holds, would give nothing back.
    if (state.data ? state.data.use_count() > 1 : state.room.used_bytes() > 0) return 0;
    shard->busy = true;
    data = state.data;
    bytes = state.format.Bytes(shard->count());
    version = shard->version;
  }
  std::optional<SpilledSlot> spilled;
  auto disk = tiers_->accountant().Reserve({Tier::kNvme, layout_.job, SlotName(slot)}, bytes);
  absl::Status status = disk.status();
  if (status.ok() && data != nullptr) {
    auto written = tiers_->Spill(shard->Key(layout_.job, slot), version, data->bytes(), nullptr);
    status = written.status();
    if (written.ok()) {
      spilled = *written;
      status = disk->SetUsed(bytes);
    }
  }
  uint64_t freed = 0;
  if (status.ok()) {
    MutexLock lock(&shard->mutex);
    SlotState& state = shard->slots[static_cast<size_t>(slot)];
    freed = state.room.reserved_bytes();
    state.data.reset();
    data.reset();
    state.room = *std::move(disk);
    state.tier = Tier::kNvme;
    state.spilled = spilled;
  }
  shard->Release();
  if (!status.ok()) return status;
  return freed;
}

// ---- What can be seen ----

std::vector<int32_t> ShardStore::NextUseOrder() const {
  MutexLock lock(&mutex_);
  std::vector<int32_t> order = pulled_;
  std::set<int32_t> seen(order.begin(), order.end());
  for (int32_t id : pulled_before_)
    if (seen.insert(id).second) order.push_back(id);
  for (const OwnedShard& shard : layout_.shards)
    if (!seen.contains(shard.id)) order.push_back(shard.id);
  return order;
}

absl::StatusOr<int64_t> ShardStore::version(int32_t id) const {
  auto shard = Find(id);
  if (!shard.ok()) return shard.status();
  MutexLock lock(&(*shard)->mutex);
  return (*shard)->version;
}

absl::StatusOr<ShardStatus> ShardStore::Describe(int32_t id) const {
  auto found = Find(id);
  if (!found.ok()) return found.status();
  Shard& shard = **found;
  ShardStatus status{shard.info, -1, {}, "idle"};
  std::shared_ptr<GradientStage>
      gradient;  // looked into after the shard's lock: a stage waits for room with its own held
  std::shared_ptr<LoadStage> load;
  {
    MutexLock lock(&shard.mutex);
    status.version = shard.version;
    for (size_t i = 0; i < kStoredSlotCount; ++i)
      if (const SlotState& slot = shard.slots[i]; slot.format.exists())
        status.slots.push_back(
            {static_cast<Slot>(i), slot.format.dtype, slot.tier, slot.format.Bytes(shard.count())});
    if (shard.applying) {
      status.stage = "applying";
      return status;
    }
    gradient = shard.gradient;
    load = shard.load;
  }
  if (gradient) {
    MutexLock lock(&gradient->mutex);
    const auto& pieces = gradient->pieces;
    const size_t stored = std::count_if(pieces.begin(), pieces.end(),
                                        [](const GradientPiece& p) { return p.stored; });
    status.stage = gradient->result
                       ? "staged"
                       : absl::StrCat("staging ", stored, " of ", pieces.size(), " pieces");
  } else if (load) {
    MutexLock lock(&load->mutex);
    status.stage =
        load->result ? "staged" : absl::StrCat("staging ", load->pieces.size(), " pieces of state");
  }
  return status;
}

uint64_t ShardStore::RestBytes(uint32_t tensor) const {
  uint64_t bytes = 0;
  for (const auto& shard : shards_) {
    if (shard->info.tensor != tensor) continue;
    MutexLock lock(&shard->mutex);
    for (const SlotState& slot : shard->slots) bytes += slot.format.Bytes(shard->count());
  }
  return bytes;
}

}  // namespace orlop::server
