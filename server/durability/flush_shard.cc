#include "server/durability/flush_shard.h"

#include <optional>
#include <utility>

#include "base/checksum.h"

namespace orlop::server {
namespace {

void AddStaged(const std::optional<StagedShard>& staged, Encoder* out) {
  out->Add(uint64_t{staged.has_value()});
  if (staged)
    out->Add(staged->digest)
        .Add(staged->sum_squares)
        .Add(staged->nonfinite_count)
        .Add(uint64_t{staged->absent});
}
std::optional<StagedShard> Staged(Decoder* in) {
  if (in->Number() == 0) return std::nullopt;
  StagedShard staged;
  staged.digest = in->Digest();
  staged.sum_squares = in->Double();
  staged.nonfinite_count = in->Number();
  staged.absent = in->Number() != 0;
  return staged;
}

}  // namespace

absl::Status FlushAccess::WriteBytes(storage::Store* store, const Shard& shard,
                                     const std::string& name, const BufferPtr& bytes,
                                     Encoder* index) {
  index->Add(uint64_t{bytes ? bytes->size() : 0})
      .Add(bytes ? Checksum64(bytes->data(), bytes->size()) : 0);
  if (!bytes) return absl::OkStatus();
  return Annotated(store->WriteBulk(Key(shard, name), bytes->bytes()), What(shard, name));
}

absl::Status FlushAccess::ReadBytes(const storage::Store& store, const Shard& shard,
                                    const std::string& name, uint64_t checksum, Buffer* out) {
  const std::string what = What(shard, name);
  absl::Status read = store.ReadBulk(Key(shard, name), {out->data(), out->size()});
  if (!read.ok()) return DamagedFlush(what, std::string(read.message()));
  if (const uint64_t actual = Checksum64(out->data(), out->size()); actual != checksum)
    return DamagedFlush(what, absl::StrFormat("checksum %016x; expected %016x", actual, checksum));
  return absl::OkStatus();
}

absl::Status FlushAccess::WriteShard(storage::Store* store, int64_t step, Shard* shard,
                                     Encoder* index) {
  if (shard->version != step)
    return ShardError(absl::StatusCode::kFailedPrecondition, *shard,
                      absl::StrCat("is at version ", shard->version, "; the flush is of ", step));
  index->Add(static_cast<uint64_t>(shard->info.id))
      .Add(shard->tensor->name)
      .Add(shard->info.range.begin)
      .Add(shard->info.range.end);
  for (size_t i = 0; i < kStoredSlotCount; ++i) {
    const SlotState& state = shard->slots[i];
    index->Add(static_cast<uint64_t>(state.format.dtype));
    auto bytes = shards_->Contents(*shard, static_cast<Slot>(i), state);
    if (!bytes.ok()) return bytes.status();
    absl::Status written = WriteBytes(store, *shard, SlotName(static_cast<Slot>(i)), *bytes, index);
    if (!written.ok()) return written;
  }
  index->Add(uint64_t{shard->gradient != nullptr});
  if (shard->gradient)
    if (absl::Status written = WriteGradient(store, *shard, shard->gradient.get(), index);
        !written.ok())
      return written;
  index->Add(uint64_t{shard->load != nullptr});
  return shard->load ? WriteLoad(store, *shard, shard->load.get(), index) : absl::OkStatus();
}

absl::Status FlushAccess::WriteGradient(storage::Store* store, const Shard& shard,
                                        GradientStage* stage, Encoder* index) {
  index->Add(static_cast<uint64_t>(stage->dtype));
  if (absl::Status written = WriteBytes(store, shard, "gradient", stage->whole, index);
      !written.ok())
    return written;
  AddStaged(stage->result, index);
  index->Add(static_cast<uint64_t>(stage->pieces.size()));
  for (size_t i = 0; i < stage->pieces.size(); ++i) {
    const GradientPiece& piece = stage->pieces[i];
    index->Add(uint64_t{piece.expected.rank})
        .Add(static_cast<uint64_t>(piece.expected.region))
        .Add(uint64_t{piece.stored});
    index->Add(static_cast<uint64_t>(piece.dtype)).Add(piece.result.digest);
    index->Add(piece.result.sums.sum_squares).Add(piece.result.sums.nonfinite_count);
    absl::Status written = WriteBytes(store, shard, absl::StrCat("piece-", i),
                                      piece.stored ? piece.bytes : nullptr, index);
    if (!written.ok()) return written;
  }
  return absl::OkStatus();
}

absl::Status FlushAccess::WriteLoad(storage::Store* store, const Shard& shard, LoadStage* stage,
                                    Encoder* index) {
  AddStaged(stage->result, index);
  index->Add(static_cast<uint64_t>(stage->pieces.size()));
  for (const LoadPiece& piece : stage->pieces)
    index->Add(static_cast<uint64_t>(piece.slot))
        .Add(static_cast<uint64_t>(piece.dtype))
        .Add(uint64_t{piece.stored})
        .Add(piece.digest)
        .Add(uint64_t{piece.box.flat})
        .Add(piece.box.offset)
        .Add(piece.box.extent);
  for (size_t i = 0; i < kStoredSlotCount; ++i) {
    BufferPtr bytes = stage->planes[i].data;
    if (const auto& spilled = stage->planes[i].spilled) {
      auto buffer = shards_->StagingBuffer(spilled->bytes);
      if (!buffer.ok()) return buffer.status();
      absl::Status restored =
          shards_->tiers_->Restore(shard.Key(shards_->layout_.job, static_cast<Slot>(i)), *spilled,
                                   {(*buffer)->data(), (*buffer)->size()});
      if (!restored.ok()) return restored;
      bytes = *std::move(buffer);
    }
    absl::Status written = WriteBytes(
        store, shard, absl::StrCat("load-", SlotName(static_cast<Slot>(i))), bytes, index);
    if (!written.ok()) return written;
  }
  return absl::OkStatus();
}

absl::Status FlushAccess::LoadShard(const storage::Store& store, bool with_staged, int64_t step,
                                    Shard* shard, Decoder* index) {
  const uint64_t id = index->Number();
  const std::string tensor = index->String();
  const Range range = {index->Number(), index->Number()};
  if (!index->ok() || id != static_cast<uint64_t>(shard->info.id) ||
      tensor != shard->tensor->name || range != shard->info.range)
    return ShardError(absl::StatusCode::kFailedPrecondition, *shard,
                      absl::StrCat("the flush has shard id ", id, " of tensor '", tensor,
                                   "' here: it is of another placement"));
  {
    MutexLock lock(&shard->mutex);
    shard->version = step;
  }
  for (size_t i = 0; i < kStoredSlotCount; ++i)
    if (absl::Status loaded = LoadSlot(store, shard, static_cast<Slot>(i), index); !loaded.ok())
      return loaded;
  if (index->Number() != 0)
    if (absl::Status loaded = LoadGradient(store, with_staged, shard, index); !loaded.ok())
      return loaded;
  return index->Number() != 0 ? LoadLoad(store, with_staged, shard, index) : absl::OkStatus();
}

absl::Status FlushAccess::LoadSlot(const storage::Store& store, Shard* shard, Slot slot,
                                   Decoder* index) {
  SlotState& state = shard->slots[static_cast<size_t>(slot)];
  const uint64_t dtype = index->Number(), size = index->Number(), checksum = index->Number();
  const std::string name = SlotName(slot);
  if (dtype != static_cast<uint64_t>(state.format.dtype) ||
      (size != 0 && size != state.format.Bytes(shard->count())))
    return ShardError(absl::StatusCode::kFailedPrecondition, *shard,
                      absl::StrCat("the flush has ", size, " bytes of ", name,
                                   " in another format: another optimizer configuration"));
  const SlotKey key = shard->Key(shards_->layout_.job, slot);
  std::optional<SpilledSlot> old;
  {
    MutexLock lock(&shard->mutex);
    state.data.reset();
    old = std::exchange(state.spilled, std::nullopt);
  }
  if (old)
    (void)shards_->tiers_->Erase(key,
                                 *old);  // a failed erase leaves bytes that the next start removes
  if (size == 0) return absl::OkStatus();
  if (state.tier == Tier::kDram && state.room.used_bytes() > 0) {  // a reader holds what was here
    auto room = shards_->tiers_->Reserve({Tier::kDram, shards_->layout_.job, name},
                                         Buffer::Footprint(size));
    if (!room.ok()) return Annotated(room.status(), What(*shard, name));
    state.room = *std::move(room);
  }
  auto buffer =
      state.tier == Tier::kDram
          ? state.room.Allocate(size)
          : shards_->tiers_->NewBuffer({Tier::kDram, shards_->layout_.job, "messages"}, size);
  if (!buffer.ok()) return Annotated(buffer.status(), What(*shard, name));
  if (absl::Status read = ReadBytes(store, *shard, name, checksum, buffer->get()); !read.ok())
    return read;
  if (state.tier == Tier::kDram) {
    MutexLock lock(&shard->mutex);
    state.data = *std::move(buffer);
    return absl::OkStatus();
  }
  auto spilled = shards_->tiers_->Spill(key, shard->version, (*buffer)->bytes(), nullptr);
  if (!spilled.ok()) return spilled.status();
  MutexLock lock(&shard->mutex);
  state.spilled = *spilled;
  return state.room.SetUsed(size);
}

absl::StatusOr<BufferPtr> FlushAccess::ReadStaged(const storage::Store& store, bool keep,
                                                  const Shard& shard, const std::string& name,
                                                  Decoder* index) {
  const uint64_t size = index->Number(), checksum = index->Number();
  if (size == 0 || !keep) return BufferPtr();
  auto buffer = shards_->StagingBuffer(size);
  if (!buffer.ok()) return Annotated(buffer.status(), What(shard, name));
  if (absl::Status read = ReadBytes(store, shard, name, checksum, buffer->get()); !read.ok())
    return read;
  return buffer;
}

absl::Status FlushAccess::LoadGradient(const storage::Store& store, bool keep, Shard* shard,
                                       Decoder* index) {
  auto stage = std::make_shared<GradientStage>();
  stage->dtype = static_cast<v1::DType>(index->Number());
  auto whole = ReadStaged(store, keep, *shard, "gradient", index);
  if (!whole.ok()) return whole.status();
  stage->whole = *std::move(whole);
  stage->result = Staged(index);
  const uint64_t piece_count = index->Number();
  if (keep && piece_count != shard->expected.size())
    return ShardError(absl::StatusCode::kFailedPrecondition, *shard,
                      absl::StrCat("the flush has ", piece_count, " pieces; the layout expects ",
                                   shard->expected.size()));
  uint64_t elements = 0;
  for (uint64_t i = 0; i < piece_count && index->ok(); ++i) {
    GradientPiece piece;
    const uint64_t rank = index->Number(), region = index->Number();
    piece.stored = index->Number() != 0;
    piece.dtype = static_cast<v1::DType>(index->Number());
    piece.result.digest = index->Digest();
    piece.result.sums.sum_squares = index->Double();
    piece.result.sums.nonfinite_count = index->Number();
    auto bytes = ReadStaged(store, keep, *shard, absl::StrCat("piece-", i), index);
    if (!bytes.ok()) return bytes.status();
    piece.bytes = *std::move(bytes);
    if (!keep) continue;
    piece.expected = shard->expected[i];
    if (piece.expected.rank != rank || static_cast<uint64_t>(piece.expected.region) != region)
      return ShardError(absl::StatusCode::kFailedPrecondition, *shard,
                        "the flush has pieces of another contribution layout");
    piece.part = BoxPart(piece.expected.box, shard->tensor->shape, shard->info.range);
    elements += piece.part.count();
    stage->pieces.push_back(std::move(piece));
  }
  stage->direct = elements == shard->count();
  if (keep) shard->gradient = std::move(stage);
  return absl::OkStatus();
}

absl::Status FlushAccess::LoadLoad(const storage::Store& store, bool keep, Shard* shard,
                                   Decoder* index) {
  auto stage = std::make_shared<LoadStage>();
  stage->result = Staged(index);
  const uint64_t piece_count = index->Number();
  for (uint64_t i = 0; i < piece_count && index->ok(); ++i) {
    LoadPiece piece;
    piece.slot = static_cast<Slot>(index->Number());
    piece.dtype = static_cast<v1::DType>(index->Number());
    piece.stored = index->Number() != 0;
    piece.digest = index->Digest();
    piece.box.flat = index->Number() != 0;
    piece.box.offset = index->Numbers();
    piece.box.extent = index->Numbers();
    stage->pieces.push_back(std::move(piece));
  }
  for (size_t i = 0; i < kStoredSlotCount; ++i) {
    auto bytes = ReadStaged(store, keep, *shard,
                            absl::StrCat("load-", SlotName(static_cast<Slot>(i))), index);
    if (!bytes.ok()) return bytes.status();
    stage->planes[i].data = *std::move(bytes);
  }
  if (keep) shard->load = std::move(stage);
  return absl::OkStatus();
}

}  // namespace orlop::server
