// Staging of SetState: pieces of any slot become new planes in their final format; what pieces
// leave out keeps its bits.
#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/casts.h"
#include "kernels/quantize.h"
#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/shards/shard.h"

namespace orlop::server {
namespace {

constexpr size_t kNone = kStoredSlotCount;
size_t Index(Slot slot) { return static_cast<size_t>(slot); }

// The scales beside a slot of codes, and back.
Slot AbsmaxOf(Slot codes) { return static_cast<Slot>(Index(codes) + 1); }

// How a piece's elements become stored ones.
enum class Conversion : uint8_t { kCopy, kSplit, kQuantise };
struct Recipe {
  Conversion conversion = Conversion::kCopy;
  size_t first = kNone;  // stored slots written
  size_t second = kNone;
};

// InvalidArgument if this slot cannot be set from this dtype.
absl::StatusOr<Recipe> RecipeOf(const Shard& shard,
                                const std::array<SlotState, kStoredSlotCount>& slots, Slot slot,
                                v1::DType dtype) {
  const Slot stored = slot == Slot::kMaster ? Slot::kWeight : slot;
  const SlotFormat& format = slots[Index(stored)].format;
  const std::string what = absl::StrCat(SlotName(slot), " as ", std::string(DTypeName(dtype)));
  if (!format.exists() || (slot == Slot::kMaster && !shard.tensor->is_parameter))
    return ShardError(absl::StatusCode::kInvalidArgument, shard,
                      absl::StrCat("has no slot ", SlotName(slot)));
  const bool remainder = slots[Index(Slot::kRemainder)].format.exists();
  if (shard.tensor->is_parameter && stored == Slot::kWeight &&
      (dtype == v1::DTYPE_F32 || (dtype == v1::DTYPE_F16 && slot == Slot::kWeight)))
    return Recipe{Conversion::kSplit, Index(Slot::kWeight),
                  remainder ? Index(Slot::kRemainder) : kNone};
  if (slot != Slot::kMaster && dtype == format.dtype)
    return Recipe{Conversion::kCopy, Index(stored)};
  if (format.dtype == v1::DTYPE_U8 && dtype == v1::DTYPE_F32 && shard.tensor->is_parameter)
    return Recipe{Conversion::kQuantise, Index(stored), Index(AbsmaxOf(stored))};
  return ShardError(absl::StatusCode::kInvalidArgument, shard,
                    absl::StrCat("cannot set ", what, "; it is stored as ",
                                 std::string(DTypeName(format.dtype))));
}

bool WholeBlocks(Range flat, uint64_t element_count) {
  return flat.begin % kernels::kQuantBlock == 0 &&
         (flat.end % kernels::kQuantBlock == 0 || flat.end == element_count);
}

class LoadSink : public PieceSink {
 public:
  struct Plane {
    BufferPtr data;
    SlotFormat format;
  };
  LoadSink(const Shard& shard, std::shared_ptr<LoadStage> stage, Slot slot, v1::DType dtype,
           const Box& box, Conversion conversion, kernels::Rounding rounding, Plane first,
           Plane second)
      : shard_(shard),
        stage_(std::move(stage)),
        slot_(slot),
        dtype_(dtype),
        conversion_(conversion),
        rounding_(rounding),
        first_(std::move(first)),
        second_(std::move(second)),
        cursor_(shard, box) {}

  absl::Status Write(uint64_t offset_bytes, absl::Span<const uint8_t> bytes) override {
    // A stream that its client gave up may still write; what is filled for a commit is final.
    MutexLock lock(&stage_->mutex);
    if (stage_->dropped || stage_->result) return AttemptDropped(shard_);
    const uint64_t size = ElementBytes(dtype_);
    // As they are stored: scales or packed codes, of a flat box of whole blocks.
    if (conversion_ == Conversion::kCopy && first_.format.elements_per > 1) {
      if (!started_)
        (void)cursor_.Advance(1, [&](uint64_t local, uint64_t, uint64_t) {
          base_ = local / first_.format.elements_per;
          return absl::OkStatus();
        });
      started_ = true;
      std::memcpy(first_.data->data() + base_ * size + offset_bytes, bytes.data(), bytes.size());
      return absl::OkStatus();
    }
    return cursor_.Advance(
        bytes.size() / size, [&](uint64_t local, uint64_t count, uint64_t first) {
          return Convert(local, count, bytes.subspan(first * size, count * size));
        });
  }

 private:
  absl::Status Convert(uint64_t local, uint64_t count, absl::Span<const uint8_t> bytes) {
    switch (conversion_) {
      case Conversion::kCopy:
        if (first_.format.axis != SlotFormat::Axis::kElements) {
          for (uint64_t i = 0; i < count; ++i) {
            const uint64_t index = first_.format.AxisIndex(shard_.info.range.begin + local + i);
            std::memcpy(&first_.data->as<float>()[index - first_.format.axis_begin],
                        bytes.data() + i * sizeof(float), sizeof(float));
          }
          return absl::OkStatus();
        }
        std::memcpy(first_.data->data() + local * ElementBytes(dtype_), bytes.data(), bytes.size());
        return absl::OkStatus();
      case Conversion::kSplit: {
        if (absl::Status widened = Widen(bytes, count); !widened.ok()) return widened;
        const absl::Span<uint16_t> weight = first_.data->as<uint16_t>().subspan(local, count);
        if (!second_.data) return kernels::RoundToBF16Away(values_, weight);
        if (second_.format.dtype == v1::DTYPE_I8)
          return kernels::SplitMaster24(values_, weight,
                                        second_.data->as<int8_t>().subspan(local, count));
        return kernels::SplitMaster(values_, weight,
                                    second_.data->as<int16_t>().subspan(local, count));
      }
      case Conversion::kQuantise: {
        if (local % kernels::kQuantBlock != 0 ||
            (count % kernels::kQuantBlock != 0 && local + count != shard_.count()))
          return ShardError(absl::StatusCode::kInvalidArgument, shard_,
                            absl::StrCat(SlotName(slot_),
                                         ": fp32 contents of a quantised slot cover whole blocks "
                                         "of ",
                                         kernels::kQuantBlock));
        if (absl::Status widened = Widen(bytes, count); !widened.ok()) return widened;
        const bool four_bit = first_.format.elements_per == 2;
        const auto quantise = four_bit ? kernels::RequantizeBlocks4 : kernels::RequantizeBlocks;
        return quantise(CodeBookOf(slot_), rounding_, values_,
                        first_.data->as<uint8_t>().subspan(local / first_.format.elements_per,
                                                           first_.format.ElementCount(count)),
                        second_.data->as<float>().subspan(local / second_.format.elements_per,
                                                          second_.format.ElementCount(count)));
      }
    }
    return absl::InternalError("conversion");
  }
  absl::Status Widen(absl::Span<const uint8_t> bytes, uint64_t count) {
    values_.resize(count);
    return kernels::WidenToF32({KernelDType(dtype_), bytes.data(), count}, absl::MakeSpan(values_));
  }

  const Shard& shard_;
  const std::shared_ptr<LoadStage> stage_;
  const Slot slot_;
  const v1::DType dtype_;
  const Conversion conversion_;
  const kernels::Rounding rounding_;
  Plane first_, second_;
  RunCursor cursor_;
  bool started_ = false;
  uint64_t base_ = 0;  // first block
  std::vector<float> values_;
};

bool Overlap(const Shard& shard, const Box& a, const Box& b) {
  if (a.flat || b.flat) {
    const Box& flat = a.flat ? a : b;
    const Box& other = a.flat ? b : a;
    const Range range = {std::max(flat.offset[0], shard.info.range.begin),
                         std::min(flat.offset[0] + flat.extent[0], shard.info.range.end)};
    return !range.empty() && !BoxPart(other, shard.tensor->shape, range).empty();
  }
  for (size_t i = 0; i < a.offset.size(); ++i)
    if (a.offset[i] + a.extent[i] <= b.offset[i] || b.offset[i] + b.extent[i] <= a.offset[i])
      return false;
  return true;
}

bool Writes(const Recipe& recipe, size_t slot) {
  return recipe.first == slot || recipe.second == slot;
}

// Elements (or blocks) of a plane that pieces cover, as bits.
void Cover(const Shard& shard, const SlotFormat& format, const Box& box,
           std::vector<bool>* covered) {
  ForEachRun(box, shard.tensor->shape, shard.info.range, [&](Range run) {
    if (format.axis != SlotFormat::Axis::kElements) {
      for (uint64_t element = run.begin; element < run.end; ++element)
        (*covered)[format.AxisIndex(element) - format.axis_begin] = true;
      return;
    }
    uint64_t begin = run.begin - shard.info.range.begin, end = run.end - shard.info.range.begin;
    begin /= format.elements_per;
    end = format.ElementCount(end);
    std::fill(covered->begin() + begin, covered->begin() + end, true);
  });
}

}  // namespace

absl::StatusOr<std::vector<std::pair<Slot, Box>>> ShardStore::StagedLoads(int32_t id) const {
  auto found = Find(id);
  if (!found.ok()) return found.status();
  std::shared_ptr<LoadStage> stage;
  {
    MutexLock lock(&(*found)->mutex);
    stage = (*found)->load;
  }
  std::vector<std::pair<Slot, Box>> loads;
  if (!stage) return loads;
  MutexLock lock(&stage->mutex);
  for (const LoadPiece& piece : stage->pieces) {
    if (piece.stored) loads.emplace_back(piece.slot, piece.box);
  }
  return loads;
}

absl::StatusOr<std::unique_ptr<PieceWriter>> ShardStore::BeginLoad(int32_t id, Slot slot,
                                                                   v1::DType dtype,
                                                                   const Box& box) {
  auto writer = TryBeginLoad(id, slot, dtype, box);
  if (!absl::IsResourceExhausted(writer.status())) return writer;
  // Move something cold out of the way, which takes locks of shards, then try again.
  auto shard = Find(id);
  uint64_t bytes = 0;
  {
    MutexLock lock(&(*shard)->mutex);
    for (const SlotState& state : (*shard)->slots)
      bytes += state.format.exists() ? Buffer::Footprint(state.format.Bytes((*shard)->count())) : 0;
  }
  (void)tiers_->Reserve({Tier::kDram, layout_.job, "staging"}, bytes);  // given back at once
  return TryBeginLoad(id, slot, dtype, box);
}

absl::StatusOr<std::unique_ptr<PieceWriter>> ShardStore::TryBeginLoad(int32_t id, Slot slot,
                                                                      v1::DType dtype,
                                                                      const Box& box) {
  auto found = Find(id);
  if (!found.ok()) return found.status();
  Shard& shard = **found;
  const Tensor& tensor = *shard.tensor;
  if (absl::Status valid = ValidateBox(box, tensor.shape, tensor.element_count); !valid.ok())
    return ShardError(valid.code(), shard, std::string(valid.message()));
  const Box simple = Simplified(box, tensor.shape);
  const Range part = BoxPart(simple, tensor.shape, shard.info.range);
  if (part.empty())
    return ShardError(absl::StatusCode::kInvalidArgument, shard,
                      absl::StrCat("box ", ToString(box), " does not touch it"));
  MutexLock lock(&shard.mutex);
  if (shard.busy || configuring_)
    return ShardError(absl::StatusCode::kUnavailable, shard,
                      configuring_ ? "is being configured" : "is being applied",
                      v1::ErrorDetail::STOPPING);
  auto recipe = RecipeOf(shard, shard.slots, slot, dtype);
  if (!recipe.ok()) return recipe.status();
  const SlotFormat format = shard.slots[recipe->first].format;
  if (absl::Status valid = format.CheckBox(tensor.shape, box, slot); !valid.ok())
    return ShardError(valid.code(), shard, std::string(valid.message()));
  uint64_t elements = part.count();
  if (format.elements_per > 1 || recipe->conversion == Conversion::kQuantise) {
    if (simple.flat) {
      const Range flat = {std::max(simple.offset[0], shard.info.range.begin),
                          std::min(simple.offset[0] + simple.extent[0], shard.info.range.end)};
      if (!WholeBlocks(flat, tensor.element_count))
        return ShardError(absl::StatusCode::kInvalidArgument, shard,
                          absl::StrCat(SlotName(slot), ": box ", ToString(box),
                                       " is not whole blocks of ", kernels::kQuantBlock));
      if (recipe->conversion == Conversion::kCopy) elements = format.ElementCount(flat.count());
    } else if (recipe->conversion == Conversion::kCopy) {
      return ShardError(absl::StatusCode::kInvalidArgument, shard,
                        absl::StrCat(SlotName(slot), " is set by flat boxes"));
    }
  }
  if (!shard.load) shard.load = std::make_shared<LoadStage>();
  const std::shared_ptr<LoadStage> stage = shard.load;
  MutexLock stage_lock(&stage->mutex);
  const PieceWriter::Options options{elements * ElementBytes(dtype), kernels::DType::kF32, false,
                                     absl::StrCat(shard.Name(), ", ", SlotName(slot))};
  size_t index = stage->pieces.size();
  for (size_t i = 0; i < stage->pieces.size(); ++i) {
    const LoadPiece& piece = stage->pieces[i];
    const bool same = piece.slot == slot && piece.dtype == dtype && piece.box == simple;
    if (same && piece.stored) {
      auto keep = [&shard, digest = piece.digest](const PieceResult& result) -> absl::Status {
        if (result.digest == digest) return absl::OkStatus();
        return ShardError(absl::StatusCode::kAlreadyExists, shard,
                          "another rank has set this box to other bytes",
                          v1::ErrorDetail::CONFLICT);
      };
      return std::make_unique<PieceWriter>(options, std::make_unique<PieceSink>(), std::move(keep),
                                           nullptr);
    }
    if (same && piece.claimed)
      return ShardError(absl::StatusCode::kUnavailable, shard,
                        "another stream is sending this piece", v1::ErrorDetail::STOPPING);
    if (same) index = i;
    if (same || !(piece.claimed || piece.stored)) continue;
    auto other = RecipeOf(shard, shard.slots, piece.slot, piece.dtype);
    if (!other.ok()) return other.status();
    const bool share = Writes(*other, recipe->first) ||
                       (recipe->second != kNone && Writes(*other, recipe->second));
    if (share && Overlap(shard, piece.box, simple))
      return ShardError(absl::StatusCode::kAlreadyExists, shard,
                        absl::StrCat(SlotName(slot), " ", ToString(box), " overlaps ",
                                     SlotName(piece.slot), " ", ToString(piece.box)),
                        v1::ErrorDetail::CONFLICT);
  }
  for (size_t plane : {recipe->first, recipe->second}) {
    if (plane == kNone || stage->planes[plane].data || stage->planes[plane].spilled) continue;
    SlotState& state = shard.slots[plane];
    const uint64_t bytes = state.format.Bytes(shard.count());
    // An empty slot's own room is free for its first contents. What goes to disk passes through the
    // staging of gradients, which a LOAD has none of.
    if (state.tier == Tier::kNvme) {
      stage->planes[plane].data = ReservedStaging(bytes);
    } else if (!state.data) {
      stage->planes[plane].data = InitialBuffer(state.format, bytes, &state.room).value_or(nullptr);
    }
    if (stage->planes[plane].data) continue;
    auto room = tiers_->accountant().Reserve({Tier::kDram, layout_.job, "staging"},
                                             Buffer::Footprint(bytes));
    if (!room.ok()) return Annotated(room.status(), shard.Name());
    auto buffer = room->Allocate(bytes);
    if (!buffer.ok()) return Annotated(buffer.status(), shard.Name());
    stage->planes[plane].data = *std::move(buffer);
    stage->planes[plane].room = *std::move(room);
  }
  auto plane_of = [&](size_t plane) {
    return plane == kNone ? LoadSink::Plane{}
                          : LoadSink::Plane{stage->planes[plane].data, shard.slots[plane].format};
  };
  auto sink = std::make_unique<LoadSink>(shard, stage, slot, dtype, simple, recipe->conversion,
                                         optimizers_[shard.info.tensor].rounding,
                                         plane_of(recipe->first), plane_of(recipe->second));
  if (index == stage->pieces.size()) stage->pieces.push_back({slot, dtype, simple});
  stage->pieces[index].claimed = true;
  // Whole contents of slots that live on disk go there now: a job larger than memory can be loaded.
  std::vector<size_t> to_disk;
  for (size_t plane : {recipe->first, recipe->second})
    if (plane != kNone && part.count() == shard.count() && shard.slots[plane].tier == Tier::kNvme)
      to_disk.push_back(plane);
  auto keep = [this, &shard, stage, index, to_disk](const PieceResult& result) -> absl::Status {
    MutexLock lock(&stage->mutex);
    if (stage->dropped || stage->result) return AttemptDropped(shard);
    stage->pieces[index].stored = true;
    stage->pieces[index].digest = result.digest;
    for (size_t i : to_disk) {
      LoadPlane& plane = stage->planes[i];
      auto spilled = tiers_->Spill(shard.Key(layout_.job, static_cast<Slot>(i)), -1,
                                   plane.data->bytes(), nullptr);
      if (!spilled.ok()) continue;  // it stays in memory
      plane.spilled = *spilled;
      plane.digest = DigestOf(plane.data->bytes());
      plane.data.reset();
      plane.room = Reservation();
    }
    return absl::OkStatus();
  };
  auto release = [stage, index] {
    MutexLock lock(&stage->mutex);
    stage->pieces[index].claimed = false;
  };
  return std::make_unique<PieceWriter>(options, std::move(sink), std::move(keep),
                                       std::move(release));
}

absl::StatusOr<StagedShard> ShardStore::FillLoad(
    Shard* shard, const std::shared_ptr<LoadStage>& stage) NO_THREAD_SAFETY_ANALYSIS {
  {
    MutexLock lock(&shard->mutex);
    if (shard->load != stage) return AttemptDropped(*shard);
  }
  auto unset = [&] {
    return ShardError(absl::StatusCode::kFailedPrecondition, *shard,
                      "the first LOAD must set the whole weight", v1::ErrorDetail::LOADING);
  };
  if (!stage) {
    if (shard->version < 0) return unset();
    return StagedShard{.absent = true};
  }
  MutexLock lock(&stage->mutex);
  if (stage->result) return *stage->result;
  std::vector<uint64_t> identity;
  for (size_t plane = 0; plane < kStoredSlotCount; ++plane) {
    const SlotState& state = shard->slots[plane];
    const uint64_t size = state.format.exists() ? ElementBytes(state.format.dtype) : 0,
                   count = state.format.ElementCount(shard->count());
    std::vector<bool> set, zero;  // covered by pieces; zeroed by a bf16 weight
    bool any_zero = false;
    for (const LoadPiece& piece : stage->pieces) {
      if (!piece.stored) continue;
      auto recipe = RecipeOf(*shard, shard->slots, piece.slot, piece.dtype);
      if (!recipe.ok()) return recipe.status();
      if (Writes(*recipe, plane)) {
        set.resize(count);
        Cover(*shard, state.format, piece.box, &set);
      } else if (size > 0 && plane == Index(Slot::kRemainder) &&
                 recipe->first == Index(Slot::kWeight)) {
        zero.resize(count);
        any_zero = true;
        Cover(*shard, state.format, piece.box, &zero);
      }
    }
    if (plane == Index(Slot::kWeight) && shard->version < 0 &&
        (set.empty() || std::find(set.begin(), set.end(), false) != set.end()))
      return unset();
    if (set.empty() && (!any_zero || (!state.data && !state.spilled)))
      continue;  // untouched, or zero as it is
    set.resize(count);
    zero.resize(count);
    LoadPlane& target = stage->planes[plane];
    if (target.spilled) {
      identity.insert(identity.end(), {plane, target.digest.high, target.digest.low});
      continue;
    }
    if (!target.data) {
      auto room =
          tiers_->Reserve({Tier::kDram, layout_.job, "staging"}, Buffer::Footprint(count * size));
      if (!room.ok()) return Annotated(room.status(), shard->Name());
      auto buffer = room->Allocate(count * size);
      if (!buffer.ok()) return buffer.status();
      target.data = *std::move(buffer);
      target.room = *std::move(room);
    }
    if (std::find(set.begin(), set.end(), false) != set.end()) {
      auto base = Contents(*shard, static_cast<Slot>(plane), state);
      if (!base.ok()) return base.status();
      for (uint64_t i = 0; i < count; ++i) {
        if (set[i]) continue;
        uint8_t* out = target.data->data() + i * size;
        if (zero[i] || !*base)
          std::memset(out, zero[i] ? 0 : state.format.initial_byte, size);
        else
          std::memcpy(out, (*base)->data() + i * size, size);
      }
    }
    const Digest128 digest = DigestOf(target.data->bytes());
    identity.insert(identity.end(), {plane, digest.high, digest.low});
  }
  stage->result = StagedShard{Digest(identity.data(), identity.size() * sizeof(uint64_t)), 0, 0,
                              identity.empty()};
  return *stage->result;
}

}  // namespace orlop::server
