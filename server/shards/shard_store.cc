#include "server/shards/shard_store.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "base/mutex.h"
#include "kernels/optimizer.h"
#include "orlop/v1/types.pb.h"
#include "proto/dtype.h"
#include "proto/status.h"
#include "server/job/contributions.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/gradient_sum.h"
#include "server/shards/load_plan.h"
#include "server/shards/load_stage.h"
#include "server/shards/piece_writer.h"
#include "server/shards/shard.h"
#include "server/shards/shard_apply.h"
#include "server/shards/shard_image.h"
#include "server/shards/shard_info.h"
#include "server/shards/shard_pass.h"
#include "server/shards/shard_read.h"
#include "server/shards/shard_update.h"
#include "server/shards/slot_configuration.h"
#include "server/shards/staged.h"
#include "server/shards/working_slots.h"
#include "server/tiers/residency.h"
#include "server/tiers/slot_home.h"
#include "server/tiers/tier.h"

namespace orlop::server {
namespace {

std::vector<std::unique_ptr<Shard>> ShardsOf(const OwnedShards& owned, Tiers* tiers) {
  std::vector<std::unique_ptr<Shard>> shards;
  shards.reserve(owned.shards.size());
  for (const OwnedShard& shard : owned.shards)
    shards.push_back(
        std::make_unique<Shard>(ShardInfo{shard, &owned.tensors[shard.tensor]}, owned.job, tiers));
  return shards;
}

std::unique_ptr<Residency> ResidencyOf(const OwnedShards& owned,
                                       const std::vector<std::unique_ptr<Shard>>& shards,
                                       Tiers* tiers) {
  std::vector<SlotHome*> homes;
  homes.reserve(shards.size());
  for (const auto& shard : shards) homes.push_back(&shard->slots);
  return std::make_unique<Residency>(owned.job, tiers, std::move(homes));
}

absl::Status CheckExpected(const ShardInfo& shard, const ExpectedPiece& piece) {
  const Tensor& tensor = *shard.tensor;
  absl::Status valid = ValidateBox(piece.box, tensor.shape, tensor.element_count);
  if (!valid.ok()) return ShardError(valid.code(), shard, std::string(valid.message()));
  if (PartOf(shard, piece.box).empty())
    return ShardError(absl::StatusCode::kInvalidArgument, shard,
                      absl::StrCat("box ", ToString(piece.box), " does not touch it"));
  return absl::OkStatus();
}

// Sorts pieces by rank, then region. InvalidArgument if a rank has a region twice.
absl::Status SortExpected(const ShardInfo& shard, std::vector<ExpectedPiece>* expected) {
  const auto key = [](const ExpectedPiece& piece) { return std::pair(piece.rank, piece.region); };
  std::ranges::sort(*expected, {}, key);
  const auto twice = std::ranges::adjacent_find(*expected, {}, key);
  if (twice == expected->end()) return absl::OkStatus();
  return ShardError(absl::StatusCode::kInvalidArgument, shard,
                    absl::StrCat("rank ", twice->rank, " has two boxes of region ", twice->region));
}

}  // namespace

// ---- Life ----

ShardStore::ShardStore(OwnedShards owned, Tiers* tiers)
    : owned_(std::move(owned)),
      shards_(ShardsOf(owned_, tiers)),
      residency_(ResidencyOf(owned_, shards_, tiers)),
      staging_(owned_.job, residency_.get()),
      pass_room_({Tier::kDram, owned_.job, "apply"}, tiers),
      optimizers_(owned_.tensors.size()) {}

ShardStore::~ShardStore() { DropStaged(); }

absl::StatusOr<Shard*> ShardStore::Find(int32_t id) const {
  const auto found = std::ranges::lower_bound(
      shards_, id, {}, [](const std::unique_ptr<Shard>& shard) { return shard->info.id(); });
  if (found == shards_.end() || (*found)->info.id() != id)
    return MakeError(absl::StatusCode::kNotFound,
                     absl::StrCat("job '", owned_.job, "': shard id ", id, " is not held here"),
                     v1::ErrorDetail::NOT_OWNER);
  return found->get();
}

absl::StatusOr<std::unique_ptr<ShardStore>> ShardStore::Create(OwnedShards owned, Tiers* tiers) {
  auto store = std::unique_ptr<ShardStore>(new ShardStore(std::move(owned), tiers));
  // A parameter has an exact master until Configure says that it is frozen.
  TensorOptimizer any;
  any.optimizer = kernels::FindOptimizer("adamw");
  const std::vector<TensorOptimizer> frozen(store->owned_.tensors.size());
  const std::vector<TensorOptimizer> trained(store->owned_.tensors.size(), any);
  for (Slot slot : {Slot::kWeight, Slot::kRemainder})
    for (const auto& shard : store->shards_) {
      const SlotFormat format = ConfiguredFormat(*shard, trained, slot);
      if (shard->info.tensor->may_be_unset) {
        LeaveUnplaced(shard.get(), slot, format);
        continue;
      }
      absl::Status placed = store->residency_->Place(&shard->slots, slot, format);
      if (!placed.ok())
        return store->residency_->WithSmallestBudget(placed,
                                                     ConfiguredBytes(store->shards_, frozen), 0);
    }
  return store;
}

absl::Status ShardStore::Configure(const std::vector<TensorOptimizer>& optimizers) {
  if (optimizers.size() != owned_.tensors.size())
    return absl::InvalidArgumentError(
        absl::StrCat(optimizers.size(), " optimizers for ", owned_.tensors.size(), " tensors"));
  for (size_t i = 0; i < optimizers.size(); ++i)
    if (!owned_.tensors[i].is_parameter && !optimizers[i].frozen())
      return absl::InvalidArgumentError(
          absl::StrCat("tensor '", owned_.tensors[i].name, "' is a buffer: it takes no optimizer"));
  MutexLock setup(&setup_mutex_);
  if (IsConfiguredAs(optimizers)) return absl::OkStatus();
  std::vector<TensorOptimizer> before;
  Configuration after = Configuration::kSet;
  {
    MutexLock lock(&mutex_);
    before = optimizers_;
    after = std::exchange(configuration_, Configuration::kChanging);
  }
  absl::Status changed = ChangeSlots(before, optimizers);
  MutexLock lock(&mutex_);
  if (changed.ok()) optimizers_ = optimizers;
  configuration_ = changed.ok() ? Configuration::kSet : after;
  return changed;
}

// Replaces the slots whose format changes. No LOAD begins meanwhile, since configuration_ is
// kChanging.
absl::Status ShardStore::ChangeSlots(const std::vector<TensorOptimizer>& before,
                                     const std::vector<TensorOptimizer>& after) {
  for (const auto& shard : shards_)
    if (shard->HasStaged())
      return ShardError(absl::StatusCode::kFailedPrecondition, shard->info,
                        "holds staged pieces of the other optimizer configuration",
                        v1::ErrorDetail::CONFLICT);
  // Pieces that were refused have left planes in the formats of before.
  for (const auto& shard : shards_) shard->DropLoad();
  SlotChange change(&shards_, residency_.get());
  absl::Status placed = change.Place(after);
  if (placed.ok()) placed = pass_room_.Resize(PassBytes(owned_, after));
  if (placed.ok()) {
    change.Finish();
    return placed;
  }
  placed = residency_->WithSmallestBudget(placed, ConfiguredBytes(shards_, after),
                                          PassBytes(owned_, after));
  absl::Status undone = change.Undo(before);
  if (undone.ok()) undone = pass_room_.Resize(PassBytes(owned_, before));
  return undone.ok() ? placed : undone;
}

bool ShardStore::IsConfiguredAs(const std::vector<TensorOptimizer>& optimizers) const {
  MutexLock lock(&mutex_);
  return configuration_ == Configuration::kSet && optimizers == optimizers_;
}

uint64_t ShardStore::BytesAs(const std::vector<TensorOptimizer>& optimizers) const {
  return ConfiguredBytes(shards_, optimizers);
}

TensorOptimizer ShardStore::optimizer(uint32_t tensor) const {
  MutexLock lock(&mutex_);
  return optimizers_[tensor];
}

// Returns the optimizer for which the slots of a shard were placed. Unavailable while Configure
// replaces them.
absl::StatusOr<TensorOptimizer> ShardStore::SettledOptimizer(const Shard& shard) const {
  MutexLock lock(&mutex_);
  if (configuration_ == Configuration::kChanging)
    return ShardBusy(shard.info, "is being configured");
  return optimizers_[shard.info.owned.tensor];
}

// ---- Staging ----

absl::Status ShardStore::SetLayout(const std::vector<ExpectedPiece>& pieces) {
  MutexLock setup(&setup_mutex_);
  std::map<int32_t, std::vector<ExpectedPiece>> by_shard;
  for (const ExpectedPiece& piece : pieces) {
    auto shard = Find(piece.shard);
    if (!shard.ok()) return shard.status();
    if (absl::Status valid = CheckExpected((*shard)->info, piece); !valid.ok()) return valid;
    by_shard[piece.shard].push_back(piece);
  }
  uint64_t bytes = 0;
  for (const auto& shard : shards_) {
    std::vector<ExpectedPiece>& expected = by_shard[shard->info.id()];
    if (absl::Status sorted = SortExpected(shard->info, &expected); !sorted.ok()) return sorted;
    bytes += StagingBytes(shard->info, expected);
  }
  for (const auto& shard : shards_) shard->Expect({});
  // Streams of the layout before may keep buffers of its reservation. This releases the rest of it,
  // so that all bytes of the new reservation are free.
  (void)staging_.Resize(0);
  if (absl::Status reserved = staging_.Resize(bytes); !reserved.ok()) return reserved;
  for (const auto& shard : shards_) shard->Expect(std::move(by_shard[shard->info.id()]));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<PieceWriter>> ShardStore::BeginGradient(int32_t id, uint32_t rank,
                                                                       int32_t region,
                                                                       v1::DType dtype) {
  auto shard = Find(id);
  if (!shard.ok()) return shard.status();
  const ShardInfo& info = (*shard)->info;
  if (!IsGradient(dtype))
    return ShardError(
        absl::StatusCode::kInvalidArgument, info,
        absl::StrCat("a gradient is float32, bfloat16, float16 or int8 with block scales, not ",
                     std::string(DTypeName(dtype))));
  if ((*shard)->is_unset()) return NotSet(info);
  if (absl::Status room = residency_->CheckDisk(); !room.ok()) return Annotated(room, info.Name());
  return (*shard)->OpenGradient(&staging_)->Begin(rank, region, dtype);
}

absl::StatusOr<std::unique_ptr<PieceWriter>> ShardStore::BeginLoad(int32_t id, Slot slot,
                                                                   v1::DType dtype,
                                                                   const Box& box) {
  auto shard = Find(id);
  if (!shard.ok()) return shard.status();
  if (absl::Status placed = PlaceUnset(*shard); !placed.ok()) return placed;
  auto writer = TryBeginLoad(*shard, slot, dtype, box);
  if (!absl::IsResourceExhausted(writer.status())) return writer;
  // Spills cold slots outside of all locks. The reservation is given back at once, for the second
  // try.
  (void)staging_.Reserve((*shard)->slots.FootprintBytes());
  return TryBeginLoad(*shard, slot, dtype, box);
}

// Gives the weight of a tensor that may be unset its room, unless it has it.
absl::Status ShardStore::PlaceUnset(Shard* shard) {
  if (!shard->slots.is_unplaced(Slot::kWeight)) return absl::OkStatus();
  MutexLock setup(&setup_mutex_);
  const SlotFormats formats = shard->slots.formats();
  uint64_t piece_bytes = 0;
  for (const Slot slot : {Slot::kRemainder, Slot::kWeight})
    piece_bytes += Buffer::Footprint(formats[SlotIndex(slot)].Bytes(shard->info.count()));
  // What is placed in memory cannot be spilled before the LOAD is applied. So memory is left for
  // the window and for one piece of a slot on disk.
  const uint64_t left_free = piece_bytes + residency_->WindowToOpen(piece_bytes);
  const bool is_free = staging_.TryReserve(piece_bytes + left_free).ok();
  for (const Slot slot : {Slot::kRemainder, Slot::kWeight}) {
    if (!shard->slots.is_unplaced(slot)) continue;  // another stream has placed it meanwhile
    const SlotFormat& format = formats[SlotIndex(slot)];
    absl::Status placed =
        residency_->Place(&shard->slots, slot, format, is_free ? Tier::kDram : Tier::kNvme);
    if (placed.ok()) continue;
    LeaveUnplaced(shard, slot, format);
    return Annotated(placed, shard->info.Name());
  }
  return absl::OkStatus();
}

// The shard's lock is held until the piece is claimed. So either Configure sees the piece and is
// refused, or this call sees that Configure has begun and is refused before it reads formats.
absl::StatusOr<std::unique_ptr<PieceWriter>> ShardStore::TryBeginLoad(Shard* shard, Slot slot,
                                                                      v1::DType dtype,
                                                                      const Box& box) {
  MutexLock lock(&shard->mutex);
  const auto optimizer = SettledOptimizer(*shard);
  if (!optimizer.ok()) return optimizer.status();
  if (shard->slots.held()) return ShardBusy(shard->info, "is being applied");
  const auto plan = PlanLoad(shard->info, shard->slots.formats(), slot, dtype, box);
  if (!plan.ok()) return plan.status();
  if (!shard->load)
    shard->load = std::make_shared<LoadStage>(shard->info, &shard->slots, &staging_);
  return shard->load->Begin(*plan, optimizer->rounding);
}

absl::StatusOr<std::vector<std::pair<Slot, Box>>> ShardStore::StagedLoads(int32_t id) const {
  auto shard = Find(id);
  if (!shard.ok()) return shard.status();
  const std::shared_ptr<LoadStage> load = (*shard)->Load();
  return load ? load->Stored() : std::vector<std::pair<Slot, Box>>();
}

ShardStore::Stager ShardStore::StagerOf(int32_t id, bool is_load) {
  auto found = Find(id);
  if (!found.ok()) return [status = found.status()] { return status; };
  Shard* shard = *found;
  if (!is_load) return [stage = shard->OpenGradient(&staging_)] { return stage->Sum(); };
  return [shard, stage = shard->Load()]() -> absl::StatusOr<StagedShard> {
    const SlotHold hold(&shard->slots);  // Fill reads slots, so nothing may move them
    if (shard->Load() != stage) return AttemptDropped(shard->info);
    if (stage) return stage->Fill(hold);
    if (shard->slots.version() < 0 && !shard->info.tensor->may_be_unset)
      return FirstLoadIncomplete(shard->info);
    return StagedShard{.absent = true};
  };
}

void ShardStore::DropStaged() {
  for (const auto& shard : shards_) shard->DropStaged();
}

// ---- Apply ----

absl::Status ShardStore::Apply(int32_t id, const ShardUpdate& update) {
  auto found = Find(id);
  if (!found.ok()) return found.status();
  Shard* shard = *found;
  const SlotHold hold(&shard->slots);
  if (update.loads >= 0 && update.loads != loads_)
    return absl::AbortedError("the shard was restored meanwhile");
  const int64_t version = shard->slots.version();
  const bool is_load = update.kind == ShardUpdate::Kind::kLoad;
  if (is_load ? update.step <= version : update.step != version + 1 || version < 0)
    return ShardError(absl::StatusCode::kFailedPrecondition, shard->info,
                      absl::StrCat("cannot make version ", update.step, " of version ", version),
                      v1::ErrorDetail::WRONG_STEP);
  shard->slots.BeginChange(hold);
  absl::Status status;
  if (is_load) status = ApplyLoad(shard, hold, update.step);
  if (update.kind == ShardUpdate::Kind::kApply && !update.untouched)
    status = Step(shard, hold, update);
  if (!status.ok()) return status;
  shard->slots.set_version(hold, update.step);
  shard->DropStaged();
  return absl::OkStatus();
}

absl::Status ShardStore::Step(Shard* shard, const SlotHold& hold, const ShardUpdate& update) {
  const auto optimizer = SettledOptimizer(*shard);
  if (!optimizer.ok())
    return ShardError(absl::StatusCode::kFailedPrecondition, shard->info, "is being configured");
  WorkingSlots slots(&shard->slots, &hold, residency_.get());
  return ApplyGradient(*shard, *optimizer, update, &slots);
}

absl::StatusOr<std::shared_ptr<const PassResult>> ShardStore::RunPass(uint32_t tensor,
                                                                      const ShardUpdate& update) {
  WholeTensorShards whole{&owned_.tensors[tensor]};
  for (const auto& shard : shards_)
    if (shard->info.owned.tensor == tensor) whole.shards.push_back(shard.get());
  if (whole.shards.empty()) return absl::NotFoundError("no shard of the tensor is held here");
  const auto optimizer = SettledOptimizer(*whole.shards.front());
  if (!optimizer.ok()) return absl::FailedPreconditionError(optimizer.status().message());
  whole.optimizer = *optimizer;
  return server::RunPass(whole, update, &pass_room_, residency_.get());
}

// ---- Reading ----

uint64_t ShardStore::RoomToRead(const ReadRequest& request) const {
  auto shard = Find(request.shard);
  return shard.ok() ? server::RoomToRead(**shard, request) : 0;
}

absl::StatusOr<std::unique_ptr<ShardReader>> ShardStore::OpenRead(const ReadRequest& request) {
  auto shard = Find(request.shard);
  if (!shard.ok()) return shard.status();
  auto reader = OpenShardRead(**shard, request);
  const bool is_weight = request.slot == Slot::kWeight || request.slot == Slot::kMaster;
  if (reader.ok() && is_weight) residency_->Used(request.shard, request.version);
  return reader;
}

absl::StatusOr<int64_t> ShardStore::version(int32_t id) const {
  auto shard = Find(id);
  if (!shard.ok()) return shard.status();
  return (*shard)->slots.version();
}

absl::StatusOr<ShardStatus> ShardStore::Describe(int32_t id) const {
  auto shard = Find(id);
  if (!shard.ok()) return shard.status();
  const ShardInfo& info = (*shard)->info;
  ShardStatus status{info.owned, -1, {}, (*shard)->StageName()};
  const bool is_unset = (*shard)->is_unset();
  (*shard)->slots.Inspect([&](const SlotHome::View& view) {
    status.version = view.version;
    for (size_t i = 0; i < kStoredSlotCount; ++i)
      if (const SlotState& slot = view.slots[i]; slot.format.exists() && !is_unset)
        status.slots.push_back(
            {static_cast<Slot>(i), slot.format.dtype, slot.tier, slot.format.Bytes(info.count())});
  });
  return status;
}

absl::StatusOr<std::unique_ptr<ShardImage>> ShardStore::Image(int32_t id) {
  auto shard = Find(id);
  if (!shard.ok()) return shard.status();
  return std::make_unique<ShardImage>(*shard, &staging_);
}

void ShardStore::BeginRestore() {
  ++loads_;
  DropStaged();
}

}  // namespace orlop::server
