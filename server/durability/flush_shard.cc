#include "server/durability/flush_shard.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/checksum.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/durability/flush_codec.h"
#include "server/job/slots.h"
#include "server/shards/shard_image.h"
#include "server/shards/shard_store.h"
#include "storage/store.h"

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

std::string PieceName(uint64_t piece) { return absl::StrCat("piece-", piece); }
std::string PlaneName(Slot slot) { return absl::StrCat("load-", SlotName(slot)); }

}  // namespace

std::string FlushedShard::Key(const std::string& name) const {
  return prefix_ + absl::StrFormat("%08x/", image_->info().id()) + name;
}
std::string FlushedShard::What(const std::string& name) const {
  return absl::StrCat(image_->info().Name(), ", ", name);
}

// ---- Writing ----

absl::Status FlushedShard::Write(int64_t step, bool with_staged, storage::Store* store,
                                 Encoder* index) const {
  const ShardInfo& shard = image_->info();
  if (image_->version() != step)
    return ShardError(
        absl::StatusCode::kFailedPrecondition, shard,
        absl::StrCat("is at version ", image_->version(), "; the flush is of ", step));
  index->Add(static_cast<uint64_t>(shard.id()))
      .Add(shard.tensor->name)
      .Add(shard.range().begin)
      .Add(shard.range().end);
  const SlotFormats formats = image_->formats();
  for (size_t i = 0; i < kStoredSlotCount; ++i) {
    index->Add(static_cast<uint64_t>(formats[i].dtype));
    auto bytes = image_->ReadSlot(static_cast<Slot>(i));
    if (!bytes.ok()) return bytes.status();
    absl::Status written = WriteBytes(SlotName(static_cast<Slot>(i)), *bytes, store, index);
    if (!written.ok()) return written;
  }
  const auto gradient = with_staged ? image_->ReadGradient() : std::nullopt;
  index->Add(uint64_t{gradient.has_value()});
  if (gradient)
    if (absl::Status written = WriteGradient(*gradient, store, index); !written.ok())
      return written;
  const auto load = with_staged ? image_->ReadLoad() : std::nullopt;
  index->Add(uint64_t{load.has_value()});
  return load ? WriteLoad(*load, store, index) : absl::OkStatus();
}

absl::Status FlushedShard::WriteBytes(const std::string& name, const BufferPtr& bytes,
                                      storage::Store* store, Encoder* index) const {
  index->Add(bytes ? bytes->size() : 0).Add(bytes ? Checksum64(bytes->data(), bytes->size()) : 0);
  if (!bytes) return absl::OkStatus();
  return Annotated(store->WriteBulk(Key(name), bytes->bytes()), What(name));
}

absl::Status FlushedShard::WriteGradient(const GradientImage& gradient, storage::Store* store,
                                         Encoder* index) const {
  index->Add(static_cast<uint64_t>(gradient.dtype));
  if (absl::Status written = WriteBytes("gradient", gradient.whole, store, index); !written.ok())
    return written;
  AddStaged(gradient.result, index);
  index->Add(static_cast<uint64_t>(gradient.pieces.size()));
  for (size_t i = 0; i < gradient.pieces.size(); ++i) {
    const GradientPiece& piece = gradient.pieces[i];
    index->Add(uint64_t{piece.expected.rank})
        .Add(static_cast<uint64_t>(piece.expected.region))
        .Add(uint64_t{piece.stored});
    index->Add(static_cast<uint64_t>(piece.dtype)).Add(piece.result.digest);
    index->Add(piece.result.sums.sum_squares).Add(piece.result.sums.nonfinite_count);
    absl::Status written =
        WriteBytes(PieceName(i), piece.stored ? piece.bytes : nullptr, store, index);
    if (!written.ok()) return written;
  }
  return absl::OkStatus();
}

absl::Status FlushedShard::WriteLoad(const LoadImage& load, storage::Store* store,
                                     Encoder* index) const {
  AddStaged(load.result, index);
  index->Add(static_cast<uint64_t>(load.pieces.size()));
  for (const LoadPiece& piece : load.pieces)
    index->Add(static_cast<uint64_t>(piece.slot))
        .Add(static_cast<uint64_t>(piece.dtype))
        .Add(uint64_t{piece.stored})
        .Add(piece.digest)
        .Add(uint64_t{piece.box.flat})
        .Add(piece.box.offset)
        .Add(piece.box.extent);
  for (size_t i = 0; i < kStoredSlotCount; ++i) {
    auto bytes = image_->ReadPlane(static_cast<Slot>(i));
    if (!bytes.ok()) return bytes.status();
    absl::Status written = WriteBytes(PlaneName(static_cast<Slot>(i)), *bytes, store, index);
    if (!written.ok()) return written;
  }
  return absl::OkStatus();
}

// ---- Loading ----

absl::Status FlushedShard::Load(int64_t step, bool with_staged, const storage::Store& store,
                                Decoder* index) {
  const ShardInfo& shard = image_->info();
  const uint64_t id = index->Number();
  const std::string tensor = index->String();
  const Range range = {index->Number(), index->Number()};
  if (!index->ok() || id != static_cast<uint64_t>(shard.id()) || tensor != shard.tensor->name ||
      range != shard.range())
    return ShardError(absl::StatusCode::kFailedPrecondition, shard,
                      absl::StrCat("the flush has shard id ", id, " of tensor '", tensor,
                                   "' here: it is of another placement"));
  image_->set_version(step);
  for (size_t i = 0; i < kStoredSlotCount; ++i)
    if (absl::Status loaded = LoadSlot(store, static_cast<Slot>(i), index); !loaded.ok())
      return loaded;
  if (index->Number() != 0)
    if (absl::Status loaded = LoadGradient(store, with_staged, index); !loaded.ok()) return loaded;
  return index->Number() != 0 ? LoadLoad(store, with_staged, index) : absl::OkStatus();
}

absl::Status FlushedShard::ReadBytes(const storage::Store& store, const std::string& name,
                                     uint64_t checksum, Buffer* out) const {
  absl::Status read = store.ReadBulk(Key(name), {out->data(), out->size()});
  if (!read.ok()) return DamagedFlush(What(name), std::string(read.message()));
  if (const uint64_t actual = Checksum64(out->data(), out->size()); actual != checksum)
    return DamagedFlush(What(name),
                        absl::StrFormat("checksum %016x; expected %016x", actual, checksum));
  return absl::OkStatus();
}

absl::Status FlushedShard::LoadSlot(const storage::Store& store, Slot slot, Decoder* index) {
  const ShardInfo& shard = image_->info();
  const SlotFormat format = image_->formats()[SlotIndex(slot)];
  const uint64_t dtype = index->Number(), size = index->Number(), checksum = index->Number();
  const std::string name = SlotName(slot);
  if (dtype != static_cast<uint64_t>(format.dtype) ||
      (size != 0 && size != format.Bytes(shard.count())))
    return ShardError(absl::StatusCode::kFailedPrecondition, shard,
                      absl::StrCat("the flush has ", size, " bytes of ", name,
                                   " in another format: another optimizer configuration"));
  if (size == 0) {
    image_->ClearSlot(slot);
    return absl::OkStatus();
  }
  auto buffer = image_->NewSlot(slot);
  if (!buffer.ok()) return Annotated(buffer.status(), What(name));
  if (absl::Status read = ReadBytes(store, name, checksum, buffer->get()); !read.ok()) return read;
  return image_->KeepSlot(slot, *std::move(buffer));
}

// Reads a staged value into a new buffer. Returns null if there is no such value, or if not `keep`.
absl::StatusOr<BufferPtr> FlushedShard::ReadStaged(const storage::Store& store,
                                                   const std::string& name, bool keep,
                                                   Decoder* index) {
  const uint64_t size = index->Number(), checksum = index->Number();
  if (size == 0 || !keep) return BufferPtr();
  auto buffer = image_->NewStaged(size);
  if (!buffer.ok()) return Annotated(buffer.status(), What(name));
  if (absl::Status read = ReadBytes(store, name, checksum, buffer->get()); !read.ok()) return read;
  return buffer;
}

absl::Status FlushedShard::LoadGradient(const storage::Store& store, bool keep, Decoder* index) {
  GradientImage gradient;
  gradient.dtype = static_cast<v1::DType>(index->Number());
  auto whole = ReadStaged(store, "gradient", keep, index);
  if (!whole.ok()) return whole.status();
  gradient.whole = *std::move(whole);
  gradient.result = Staged(index);
  const uint64_t piece_count = index->Number();
  for (uint64_t i = 0; i < piece_count && index->ok(); ++i) {
    GradientPiece piece;
    piece.expected.rank = static_cast<uint32_t>(index->Number());
    piece.expected.region = static_cast<int32_t>(index->Number());
    piece.stored = index->Number() != 0;
    piece.dtype = static_cast<v1::DType>(index->Number());
    piece.result.digest = index->Digest();
    piece.result.sums.sum_squares = index->Double();
    piece.result.sums.nonfinite_count = index->Number();
    auto bytes = ReadStaged(store, PieceName(i), keep, index);
    if (!bytes.ok()) return bytes.status();
    piece.bytes = *std::move(bytes);
    gradient.pieces.push_back(std::move(piece));
  }
  return keep ? image_->InstallGradient(std::move(gradient)) : absl::OkStatus();
}

absl::Status FlushedShard::LoadLoad(const storage::Store& store, bool keep, Decoder* index) {
  LoadImage load;
  load.result = Staged(index);
  const uint64_t piece_count = index->Number();
  for (uint64_t i = 0; i < piece_count && index->ok(); ++i) {
    LoadPiece piece;
    piece.slot = static_cast<Slot>(std::min<uint64_t>(index->Number(), UINT8_MAX));
    piece.dtype = static_cast<v1::DType>(index->Number());
    piece.stored = index->Number() != 0;
    piece.digest = index->Digest();
    piece.box.flat = index->Number() != 0;
    piece.box.offset = index->Numbers();
    piece.box.extent = index->Numbers();
    load.pieces.push_back(std::move(piece));
  }
  std::array<BufferPtr, kStoredSlotCount> planes;
  for (size_t i = 0; i < kStoredSlotCount; ++i) {
    auto bytes = ReadStaged(store, PlaneName(static_cast<Slot>(i)), keep, index);
    if (!bytes.ok()) return bytes.status();
    planes[i] = *std::move(bytes);
  }
  return keep ? image_->InstallLoad(std::move(load), std::move(planes)) : absl::OkStatus();
}

}  // namespace orlop::server
