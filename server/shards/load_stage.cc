#include "server/shards/load_stage.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "base/checksum.h"
#include "base/mutex.h"
#include "kernels/quantize.h"
#include "kernels/types.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/load_converter.h"
#include "server/shards/load_cover.h"
#include "server/shards/load_plan.h"
#include "server/shards/piece_writer.h"
#include "server/shards/shard_info.h"
#include "server/shards/slot_mapping.h"
#include "server/shards/staged.h"
#include "server/shards/staging_room.h"
#include "server/tiers/slot_home.h"
#include "server/tiers/tier.h"

namespace orlop::server {
namespace {

// Returns the tree digest of contiguous bytes (base/checksum.h).
Digest128 DigestOf(absl::Span<const uint8_t> bytes) {
  PieceDigest digest;
  digest.AddLeaves(LeafHashes({reinterpret_cast<const char*>(bytes.data()), bytes.size()}));
  return digest.Finish();
}

bool HasContents(const LoadPlane& plane) { return plane.bytes.data || plane.bytes.spilled; }

// The claim of a piece that is stored already: Keep only compares the digests.
class RepeatedClaim : public PieceClaim {
 public:
  RepeatedClaim(const ShardInfo& shard, const Digest128& digest) : shard_(shard), digest_(digest) {}
  absl::Status Keep(const PieceResult& result) override {
    if (result.digest == digest_) return absl::OkStatus();
    return ShardError(absl::StatusCode::kAlreadyExists, shard_,
                      "another rank has set this box to other bytes", v1::ErrorDetail::CONFLICT);
  }

 private:
  const ShardInfo shard_;
  const Digest128 digest_;
};

}  // namespace

LoadStage::LoadStage(const ShardInfo& shard, SlotHome* slots, StagingRoom* room)
    : shard_(shard), slots_(slots), room_(room) {}

// ---- Pieces ----

class LoadStage::Sink : public PieceSink {
 public:
  Sink(std::shared_ptr<LoadStage> stage, LoadConverter converter)
      : stage_(std::move(stage)), converter_(std::move(converter)) {}
  // A stream that its client has given up may still write. It must not change planes that Fill has
  // hashed.
  absl::Status Write(uint64_t offset_bytes, absl::Span<const uint8_t> bytes) override {
    MutexLock lock(&stage_->mutex_);
    if (stage_->dropped_ || stage_->filling_ || stage_->result_)
      return AttemptDropped(stage_->shard_);
    return converter_.Write(offset_bytes, bytes);
  }

 private:
  const std::shared_ptr<LoadStage> stage_;
  LoadConverter converter_;
};

class LoadStage::Claim : public PieceClaim {
 public:
  Claim(std::shared_ptr<LoadStage> stage, size_t index, const LoadPlan& plan)
      : stage_(std::move(stage)), index_(index), mapping_(plan.mapping), is_whole_(plan.is_whole) {}
  ~Claim() override {
    MutexLock lock(&stage_->mutex_);
    stage_->pieces_[index_].claimed = false;
  }
  absl::Status Keep(const PieceResult& result) override { return stage_->Keep(index_, result); }
  // If the piece has set all of its slots, and these are spilled, their planes move to disk now:
  // so a job larger than memory can be loaded.
  void Settle() override {
    if (!is_whole_) return;
    stage_->Settle(mapping_.first);
    if (mapping_.second) stage_->Settle(*mapping_.second);
  }

 private:
  const std::shared_ptr<LoadStage> stage_;
  const size_t index_;
  const SlotMapping mapping_;
  const bool is_whole_;
};

PieceWriter::Options LoadStage::OptionsOf(const LoadPlan& plan) const {
  return {plan.total_bytes, kernels::DType::kF32, false,
          absl::StrCat(shard_.Name(), ", ", SlotName(plan.slot))};
}

absl::StatusOr<std::unique_ptr<PieceWriter>> LoadStage::Begin(const LoadPlan& plan,
                                                              kernels::Rounding rounding) {
  const SlotFormats formats = slots_->formats();
  MutexLock lock(&mutex_);
  if (filling_) return ShardBusy(shard_, "is being applied");
  const auto index = FindPlace(formats, plan);
  if (!index.ok()) return index.status();
  if (*index < pieces_.size() && pieces_[*index].stored)
    return std::make_unique<PieceWriter>(
        OptionsOf(plan), std::make_unique<PieceSink>(),
        std::make_unique<RepeatedClaim>(shard_, pieces_[*index].digest));
  LoadConverter::Plane converted[2];
  for (const bool second : {false, true}) {
    if (second && !plan.mapping.second) continue;
    const Slot slot = second ? *plan.mapping.second : plan.mapping.first;
    if (absl::Status made = MakePlane(formats, slot); !made.ok()) return made;
    converted[second] = {plane(slot).bytes.data, formats[SlotIndex(slot)]};
  }
  if (*index == pieces_.size()) pieces_.push_back({plan.slot, plan.dtype, plan.box});
  pieces_[*index].claimed = true;
  return std::make_unique<PieceWriter>(
      OptionsOf(plan),
      std::make_unique<Sink>(shared_from_this(),
                             LoadConverter(shard_, plan, rounding, converted[0], converted[1])),
      std::make_unique<Claim>(shared_from_this(), *index, plan));
}

// Returns the index in pieces_ that the piece has or is to get. Refuses a piece that overlaps
// another one, and one that another stream is sending.
absl::StatusOr<size_t> LoadStage::FindPlace(const SlotFormats& formats, const LoadPlan& plan) {
  size_t index = pieces_.size();
  for (size_t i = 0; i < pieces_.size(); ++i) {
    const LoadPiece& piece = pieces_[i];
    if (piece.slot == plan.slot && piece.dtype == plan.dtype && piece.box == plan.box) {
      if (piece.stored) return i;
      if (piece.claimed) return ShardBusy(shard_, "another stream is sending this piece");
      index = i;
      continue;
    }
    if (!piece.claimed && !piece.stored) continue;
    const auto other = MapSlot(shard_, formats, piece.slot, piece.dtype, "set");
    if (!other.ok()) return other.status();
    const bool shares = other->uses(plan.mapping.first) ||
                        (plan.mapping.second && other->uses(*plan.mapping.second));
    if (shares && Overlap(shard_, piece.box, plan.box))
      return ShardError(absl::StatusCode::kAlreadyExists, shard_,
                        absl::StrCat(SlotName(plan.slot), " ", ToString(plan.box), " overlaps ",
                                     SlotName(piece.slot), " ", ToString(piece.box)),
                        v1::ErrorDetail::CONFLICT);
  }
  return index;
}

// Allocates the plane of `slot` unless it exists. The plane of a slot in memory that was never
// written takes the slot's own room. The plane of a slot on disk takes the room that is reserved
// for gradients, of which a LOAD has none. All others take memory beside both.
absl::Status LoadStage::MakePlane(const SlotFormats& formats, Slot slot) {
  LoadPlane& made = plane(slot);
  if (HasContents(made)) return absl::OkStatus();
  const uint64_t bytes = formats[SlotIndex(slot)].Bytes(shard_.count());
  if (slots_->tier(slot) == Tier::kNvme) {
    made.bytes.data = room_->TryAllocate(bytes);
  } else {
    auto first = slots_->FirstBuffer(slot);
    if (!first.ok()) return ShardBusy(shard_, "is being applied");
    made.bytes.data = *std::move(first);
  }
  if (made.bytes.data) return absl::OkStatus();
  auto room = room_->TryReserve(Buffer::Footprint(bytes));
  if (!room.ok()) return Annotated(room.status(), shard_.Name());
  auto buffer = room->Allocate(bytes);
  if (!buffer.ok()) return Annotated(buffer.status(), shard_.Name());
  made.bytes.data = *std::move(buffer);
  made.room = *std::move(room);
  return absl::OkStatus();
}

absl::Status LoadStage::Keep(size_t piece, const PieceResult& result) {
  MutexLock lock(&mutex_);
  if (dropped_ || filling_ || result_) return AttemptDropped(shard_);
  pieces_[piece].stored = true;
  pieces_[piece].digest = result.digest;
  return absl::OkStatus();
}

// Moves the plane of `slot`, which one kept piece has written whole, to disk if the slot is there.
void LoadStage::Settle(Slot slot) {
  BufferPtr data;
  {
    MutexLock lock(&mutex_);
    LoadPlane& moved = plane(slot);
    if (dropped_ || moved.moving || !moved.bytes.data || slots_->tier(slot) != Tier::kNvme) return;
    moved.moving = true;
    data = moved.bytes.data;
  }
  Tiers* const tiers = slots_->tiers();
  const SlotKey key = slots_->Key(slot);
  const auto spilled = tiers->Spill(key, -1, data->bytes(), nullptr);
  const Digest128 digest = spilled.ok() ? DigestOf(data->bytes()) : Digest128();
  MutexLock lock(&mutex_);
  LoadPlane& moved = plane(slot);
  moved.moving = false;
  moved_.SignalAll();
  if (!spilled.ok()) return;  // the plane stays in memory
  if (dropped_) return tiers->Discard(key, *spilled);
  moved.bytes = {nullptr, *spilled};
  moved.digest = digest;
  moved.room = Reservation();
}

// ---- Filling ----

absl::StatusOr<StagedShard> LoadStage::Fill(const SlotHold& hold) {
  std::vector<LoadPiece> pieces;
  {
    MutexLock lock(&mutex_);
    if (dropped_) return AttemptDropped(shard_);
    if (result_) return *result_;
    filling_ = true;
    std::ranges::copy_if(pieces_, std::back_inserter(pieces), &LoadPiece::stored);
  }
  auto filled = FillPlanes(hold, pieces);
  MutexLock lock(&mutex_);
  filling_ = false;
  if (dropped_) return AttemptDropped(shard_);
  if (filled.ok()) result_ = *filled;
  return filled;
}

absl::StatusOr<StagedShard> LoadStage::FillPlanes(const SlotHold& hold,
                                                  const std::vector<LoadPiece>& pieces) {
  std::vector<uint64_t> identity;  // of each plane: SlotIndex, digest.high, digest.low
  for (size_t i = 0; i < kStoredSlotCount; ++i) {
    absl::Status filled = FillPlane(hold, pieces, static_cast<Slot>(i), &identity);
    if (!filled.ok()) return filled;
  }
  return StagedShard{Digest(identity.data(), identity.size() * sizeof(uint64_t)), 0, 0,
                     identity.empty()};
}

absl::Status LoadStage::FillPlane(const SlotHold& hold, const std::vector<LoadPiece>& pieces,
                                  Slot slot, std::vector<uint64_t>* identity) {
  LoadCover cover(shard_, slots_->formats(), slot);
  for (const LoadPiece& piece : pieces)
    if (absl::Status added = cover.Add(piece.slot, piece.dtype, piece.box); !added.ok())
      return added;
  const bool is_first = shard_.tensor->may_be_unset
                            ? !slots_->has_contents(hold, slot) && !pieces.empty()
                            : slots_->version() < 0;
  if (slot == Slot::kWeight && is_first && !cover.is_whole()) return FirstLoadIncomplete(shard_);
  if (cover.is_untouched(slots_->has_contents(hold, slot))) {
    MutexLock lock(&mutex_);
    if (!plane(slot).moving) Discard(slot);  // a piece that was refused may have begun it
    return absl::OkStatus();
  }
  {
    MutexLock lock(&mutex_);
    if (plane(slot).bytes.spilled) {  // Settle has hashed it; only whole planes go to disk
      const Digest128& digest = plane(slot).digest;
      identity->insert(identity->end(), {SlotIndex(slot), digest.high, digest.low});
      return absl::OkStatus();
    }
  }
  auto data = PlaneToFill(slot, cover.format().Bytes(shard_.count()));
  if (!data.ok()) return data.status();
  if (!cover.is_whole()) {
    auto base = slots_->Read(hold, slot);
    if (!base.ok()) return base.status();
    cover.FillRest(base->get(), data->get());
  }
  const Digest128 digest = DigestOf((*data)->bytes());
  identity->insert(identity->end(), {SlotIndex(slot), digest.high, digest.low});
  return absl::OkStatus();
}

// Returns the plane that pieces have written, or a new one of `bytes` bytes.
absl::StatusOr<BufferPtr> LoadStage::PlaneToFill(Slot slot, uint64_t bytes) {
  {
    MutexLock lock(&mutex_);
    if (plane(slot).bytes.data) return plane(slot).bytes.data;
  }
  auto room = room_->Reserve(Buffer::Footprint(bytes));
  if (!room.ok()) return Annotated(room.status(), shard_.Name());
  auto buffer = room->Allocate(bytes);
  if (!buffer.ok()) return buffer.status();
  MutexLock lock(&mutex_);
  plane(slot).bytes.data = *buffer;
  plane(slot).room = *std::move(room);
  return buffer;
}

absl::StatusOr<std::array<LoadPlane, kStoredSlotCount>> LoadStage::TakePlanes() {
  MutexLock lock(&mutex_);
  while (std::ranges::any_of(planes_, &LoadPlane::moving)) moved_.Wait(&mutex_);
  if (!result_)
    return ShardError(absl::StatusCode::kFailedPrecondition, shard_, "the LOAD is not staged");
  return std::exchange(planes_, {});
}

void LoadStage::Drop() {
  MutexLock lock(&mutex_);
  dropped_ = true;
  for (size_t i = 0; i < kStoredSlotCount; ++i)
    if (planes_[i].bytes.spilled) Discard(static_cast<Slot>(i));
}

// Drops a plane, which Settle is not moving.
void LoadStage::Discard(Slot slot) {
  LoadPlane& dropped = plane(slot);
  if (dropped.bytes.spilled) slots_->tiers()->Discard(slots_->Key(slot), *dropped.bytes.spilled);
  dropped = {};
}

// ---- What can be seen ----

bool LoadStage::has_begun() const {
  MutexLock lock(&mutex_);
  return std::ranges::any_of(pieces_, [](const LoadPiece& p) { return p.claimed || p.stored; });
}

bool LoadStage::has_kept() const {
  MutexLock lock(&mutex_);
  return std::ranges::any_of(pieces_, &LoadPiece::stored);
}

std::vector<std::pair<Slot, Box>> LoadStage::Stored() const {
  std::vector<std::pair<Slot, Box>> stored;
  MutexLock lock(&mutex_);
  for (const LoadPiece& piece : pieces_)
    if (piece.stored) stored.emplace_back(piece.slot, piece.box);
  return stored;
}

std::string LoadStage::Description() const {
  MutexLock lock(&mutex_);
  return result_ ? "staged" : absl::StrCat("staging ", pieces_.size(), " pieces of state");
}

LoadImage LoadStage::Image() const {
  MutexLock lock(&mutex_);
  return {result_, pieces_};
}

absl::StatusOr<BufferPtr> LoadStage::ReadPlane(Slot slot) const {
  SlotBytes bytes;
  {
    MutexLock lock(&mutex_);
    bytes = planes_[SlotIndex(slot)].bytes;
  }
  if (bytes.data || !bytes.spilled) return bytes.data;
  auto buffer = room_->Allocate(bytes.spilled->bytes);
  if (!buffer.ok()) return buffer.status();
  absl::Status restored = slots_->tiers()->Restore(slots_->Key(slot), *bytes.spilled,
                                                   {(*buffer)->data(), (*buffer)->size()});
  if (!restored.ok()) return restored;
  return buffer;
}

absl::Status LoadStage::Install(LoadImage image, std::array<BufferPtr, kStoredSlotCount> planes) {
  const SlotFormats formats = slots_->formats();
  for (const LoadPiece& piece : image.pieces) {
    if (piece.slot != Slot::kMaster && SlotIndex(piece.slot) >= kStoredSlotCount)
      return ShardError(absl::StatusCode::kFailedPrecondition, shard_, "a piece is of no slot");
    const auto plan = PlanLoad(shard_, formats, piece.slot, piece.dtype, piece.box);
    if (!plan.ok())
      return ShardError(absl::StatusCode::kFailedPrecondition, shard_,
                        absl::StrCat("a staged piece does not fit: ", plan.status().message()));
  }
  for (size_t i = 0; i < kStoredSlotCount; ++i)
    if (planes[i] && planes[i]->size() != formats[i].Bytes(shard_.count()))
      return ShardError(absl::StatusCode::kFailedPrecondition, shard_,
                        absl::StrCat("the staged ", SlotName(static_cast<Slot>(i)), " has ",
                                     planes[i]->size(), " bytes"));
  MutexLock lock(&mutex_);
  pieces_ = std::move(image.pieces);
  result_ = image.result;
  for (size_t i = 0; i < kStoredSlotCount; ++i) planes_[i].bytes.data = std::move(planes[i]);
  return absl::OkStatus();
}

}  // namespace orlop::server
