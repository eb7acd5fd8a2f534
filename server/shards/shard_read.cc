// One pull, 4 of 4 (ARCHITECTURE.md)
#include "server/shards/shard_read.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "base/checksum.h"
#include "kernels/casts.h"
#include "kernels/optimizer.h"
#include "kernels/quantize.h"
#include "kernels/types.h"
#include "orlop/v1/types.pb.h"
#include "proto/dtype.h"
#include "proto/status.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/shard.h"
#include "server/shards/shard_info.h"
#include "server/shards/slot_mapping.h"
#include "server/tiers/served_hashes.h"
#include "server/tiers/slot_home.h"

namespace orlop::server {
namespace {

// A slot that a read uses, as it was when the read was opened.
struct Seen {
  Slot slot = Slot::kWeight;
  SlotFormat format;
  SlotBytes bytes;

  Seen() = default;
  Seen(Slot slot, const SlotHome::View& view) : slot(slot) {
    const SlotState& state = view.slots[SlotIndex(slot)];
    format = state.format;
    bytes = state.bytes;
  }
};

// The slots of a read, and how values are built from them.
struct Opened {
  SlotMapping mapping;
  Seen first;
  std::optional<Seen> second;
};

absl::Status VersionGone(const ShardInfo& shard, int64_t version, const std::string& more = "") {
  return ShardError(absl::StatusCode::kOutOfRange, shard,
                    absl::StrCat("version ", version, " was applied over", more),
                    v1::ErrorDetail::VERSION_GONE);
}

absl::Status CheckVersion(const ShardInfo& shard, int64_t wanted, const SlotHome::View& view) {
  if (view.version < 0)
    return ShardError(absl::StatusCode::kFailedPrecondition, shard, "no weights are committed yet",
                      v1::ErrorDetail::LOADING);
  if (wanted < view.version || (view.changing && wanted == view.version)) {
    v1::ErrorDetail detail;
    detail.set_version(view.version);
    return Annotated(VersionGone(shard, wanted, absl::StrCat("; ", view.version, " is current")),
                     "pull", detail);
  }
  if (wanted > view.version)
    return ShardError(
        absl::StatusCode::kFailedPrecondition, shard,
        absl::StrCat("version ", wanted, " is not made yet; ", view.version, " is current"),
        v1::ErrorDetail::WRONG_STEP);
  return absl::OkStatus();
}

// Sets the dtype of `request` if it has none, and picks the slots that it reads. All of them are
// from one view, so that they have one version.
absl::StatusOr<Opened> Pick(const ShardInfo& shard, const SlotHome::View& view,
                            ReadRequest* request) {
  SlotFormats formats;
  for (size_t i = 0; i < kStoredSlotCount; ++i) formats[i] = view.slots[i].format;
  if (request->dtype == v1::DTYPE_UNSPECIFIED)
    request->dtype = request->slot == Slot::kMaster   ? v1::DTYPE_F32
                     : request->slot == Slot::kWeight ? shard.tensor->dtype
                                                      : formats[SlotIndex(request->slot)].dtype;
  const auto mapping = MapSlot(shard, formats, request->slot, request->dtype, "read");
  if (!mapping.ok()) return mapping.status();
  Opened opened{*mapping, Seen(mapping->first, view)};
  if (mapping->second) opened.second.emplace(*mapping->second, view);
  return opened;
}

// Whether chunks are parts of the slot's own buffer. `request` is complete.
bool IsDirect(const SlotFormat& format, const ReadRequest& request) {
  return request.box.flat && request.dtype == format.dtype &&
         format.axis == SlotFormat::Axis::kElements;
}

absl::Status CheckBox(const ShardInfo& shard, const SlotFormat& format, const ReadRequest& request,
                      const Box& wanted) {
  const Slot stored = request.slot == Slot::kMaster ? Slot::kWeight : request.slot;
  if (absl::Status valid = format.CheckBox(shard.tensor->shape, wanted, stored); !valid.ok())
    return ShardError(valid.code(), shard, std::string(valid.message()));
  if (BoxPart(request.box, shard.tensor->shape, shard.range()).empty())
    return ShardError(absl::StatusCode::kInvalidArgument, shard,
                      absl::StrCat("box ", ToString(wanted), " does not touch it"));
  const bool raw_blocks = format.elements_per > 1 && request.dtype == format.dtype;
  if (raw_blocks && (!request.box.flat || request.box.offset[0] % kernels::kQuantBlock != 0))
    return ShardError(
        absl::StatusCode::kInvalidArgument, shard,
        absl::StrCat(SlotName(request.slot), " is read by flat boxes of whole blocks"));
  return absl::OkStatus();
}

// Returns the bytes of a slot. If an apply replaces a value on disk while it is read, the error is
// VERSION_GONE, not DataLoss.
absl::StatusOr<BufferPtr> Fetch(const Shard& shard, Seen seen, int64_t version) {
  for (;;) {
    auto bytes = shard.slots.Read(seen.slot, seen.bytes);
    if (bytes.ok()) return bytes;
    bool is_gone = false, has_moved = false;
    shard.slots.Inspect([&](const SlotHome::View& view) {
      is_gone = view.changing || view.version != version;
      const SlotBytes& now = view.slots[SlotIndex(seen.slot)].bytes;
      // The slot may have been brought back, and spilled again.
      has_moved =
          now.data != nullptr || !now.spilled || now.spilled->serial != seen.bytes.spilled->serial;
      if (has_moved) seen.bytes = now;
    });
    if (is_gone) return VersionGone(shard.info, version);
    if (!has_moved || !absl::IsDataLoss(bytes.status())) return bytes.status();
  }
}

}  // namespace

uint64_t RoomToRead(const Shard& shard, const ReadRequest& wanted) {
  const Tensor& tensor = *shard.info.tensor;
  if (!ValidateBox(wanted.box, tensor.shape, tensor.element_count).ok()) return 0;
  ReadRequest request = wanted;
  request.box = Simplified(wanted.box, tensor.shape);
  absl::StatusOr<Opened> opened;
  shard.slots.Inspect(
      [&](const SlotHome::View& view) { opened = Pick(shard.info, view, &request); });
  if (!opened.ok()) return 0;
  uint64_t bytes = 0;
  for (const SlotBytes* slot :
       {&opened->first.bytes, opened->second ? &opened->second->bytes : nullptr})
    if (slot != nullptr && slot->data == nullptr && slot->spilled)
      bytes += Buffer::Footprint(slot->spilled->bytes);
  const bool has_bytes = opened->first.bytes.data || opened->first.bytes.spilled;
  if (has_bytes && IsDirect(opened->first.format, request)) return bytes;
  const uint64_t piece =
      BoxPart(request.box, tensor.shape, shard.info.range()).count() * ElementBytes(request.dtype);
  return bytes + kBuiltChunks * Buffer::Footprint(std::min(request.max_chunk_bytes, piece));
}

absl::StatusOr<std::unique_ptr<ShardReader>> OpenShardRead(const Shard& shard,
                                                           const ReadRequest& wanted) {
  const Tensor& tensor = *shard.info.tensor;
  if (absl::Status valid = ValidateBox(wanted.box, tensor.shape, tensor.element_count); !valid.ok())
    return ShardError(valid.code(), shard.info, std::string(valid.message()));
  ReadRequest request = wanted;
  request.box = Simplified(wanted.box, tensor.shape);
  if (shard.is_unset() && shard.slots.version() >= 0) return NotSet(shard.info);
  absl::StatusOr<Opened> opened;
  std::shared_ptr<ServedHashes> hashes;
  shard.slots.Inspect([&](const SlotHome::View& view) {
    const absl::Status there = CheckVersion(shard.info, request.version, view);
    opened = there.ok() ? Pick(shard.info, view, &request) : there;
    hashes = view.hashes;
  });
  if (!opened.ok()) return opened.status();
  const SlotFormat& format = opened->first.format;
  if (absl::Status valid = CheckBox(shard.info, format, request, wanted.box); !valid.ok())
    return valid;
  ShardReader::Source source{opened->mapping.conversion};
  source.hashes = std::move(hashes);
  auto values = Fetch(shard, opened->first, request.version);
  if (!values.ok()) return values.status();
  source.values = *std::move(values);
  if (opened->second) {
    auto secondary = Fetch(shard, *opened->second, request.version);
    if (!secondary.ok()) return secondary.status();
    source.secondary = *std::move(secondary);
    source.remainder_dtype = opened->second->format.dtype;
  }
  return std::make_unique<ShardReader>(shard.info, format, request, std::move(source),
                                       &shard.slots);
}

// ---- ShardReader ----

bool ShardReader::IsRawBlocks() const {
  return format_.elements_per > 1 && request_.dtype == format_.dtype;
}

ShardReader::ShardReader(const ShardInfo& shard, const SlotFormat& format, ReadRequest request,
                         Source source, const SlotHome* home)
    : shard_(shard),
      format_(format),
      request_(std::move(request)),
      source_(std::move(source)),
      home_(home),
      part_(BoxPart(request_.box, shard.tensor->shape, shard.range())),
      element_bytes_(ElementBytes(request_.dtype)) {
  if (!request_.box.flat) return;
  is_whole_ = part_.count() == shard.count();
  uint64_t first = std::max(request_.box.offset[0], shard.range().begin) - shard.range().begin;
  if (IsRawBlocks()) {
    part_ = {0, format_.ElementCount(part_.count())};
    first /= format_.elements_per;
  }
  if (source_.values && IsDirect(format_, request_)) direct_offset_bytes_ = first * element_bytes_;
}

absl::StatusOr<ReadChunk> ShardReader::Next() {
  const uint64_t size = std::min(request_.max_chunk_bytes, total_bytes() - offset_bytes_);
  ReadChunk chunk;
  chunk.offset_bytes = offset_bytes_;
  if (direct_offset_bytes_) {
    chunk.owner = source_.values;
    chunk.bytes = chunk.owner->bytes().subspan(*direct_offset_bytes_ + offset_bytes_, size);
  } else {
    auto buffer = FreeBuffer();
    if (!buffer.ok()) return buffer.status();
    const uint64_t first = part_.begin + offset_bytes_ / element_bytes_;
    if (absl::Status built = Build({first, first + size / element_bytes_}, (*buffer)->data());
        !built.ok())
      return built;
    chunk.owner = *std::move(buffer);
    chunk.bytes = chunk.owner->bytes().subspan(0, size);
    chunk.is_built = true;
  }
  const std::vector<uint64_t> leaves = Hash(chunk.bytes);
  chunk.checksum = ChunkChecksum(leaves);
  digest_.AddLeaves(leaves);
  offset_bytes_ += size;
  if (done()) chunk.digest = digest_.Finish();
  return chunk;
}

// Returns the leaf hashes of the next chunk. Those of a whole shard are kept for other readers.
std::vector<uint64_t> ShardReader::Hash(absl::Span<const uint8_t> chunk) const {
  const auto hash = [&] {
    return LeafHashes({reinterpret_cast<const char*>(chunk.data()), chunk.size()});
  };
  if (!is_whole_) return hash();
  const ServedHashes::Values values{request_.slot, request_.dtype};
  const size_t first = offset_bytes_ / kLeafBytes;
  const size_t count = (chunk.size() + kLeafBytes - 1) / kLeafBytes;
  if (auto known = source_.hashes->Find(values, first, count)) return *std::move(known);
  std::vector<uint64_t> leaves = hash();
  source_.hashes->Add(values, first, leaves);
  return leaves;
}

// Returns a buffer for the next chunk: one whose chunk has been released, or a new one. Reuse saves
// the page faults of fresh memory.
absl::StatusOr<BufferPtr> ShardReader::FreeBuffer() {
  for (const BufferPtr& buffer : built_)
    if (buffer.use_count() == 1) return buffer;
  auto buffer = home_->NewMessage(std::min(request_.max_chunk_bytes, total_bytes()));
  if (buffer.ok()) built_.push_back(*buffer);
  return buffer;
}

// Builds the elements `part` of the box's buffer, run by run.
absl::Status ShardReader::Build(Range part, uint8_t* out) const {
  if (IsRawBlocks()) {  // the slot was never written; otherwise nothing is built
    std::memset(out, format_.initial_byte, part.count() * element_bytes_);
    return absl::OkStatus();
  }
  RunIterator runs(request_.box, shard_.tensor->shape, shard_.range());
  absl::Status status;
  for (Run run; status.ok() && runs.Next(&run);) {
    const uint64_t begin = run.box_begin, end = begin + run.count;
    if (end <= part.begin) continue;
    if (begin >= part.end) break;
    const uint64_t from = std::max(begin, part.begin), to = std::min(end, part.end);
    status = BuildRun(run.tensor_begin + (from - begin) - shard_.range().begin, to - from,
                      out + (from - part.begin) * element_bytes_);
  }
  return status;
}

// Builds the elements [first, first + count) of the shard.
absl::Status ShardReader::BuildRun(uint64_t first, uint64_t count, uint8_t* out) const {
  const bool is_copy = source_.conversion == Conversion::kCopy;
  // The values of a slot that was never written are zero; its stored bytes are the initial byte.
  if (!source_.values) {
    std::memset(out, is_copy ? format_.initial_byte : 0, count * element_bytes_);
  } else if (format_.axis != SlotFormat::Axis::kElements) {
    CopyAverages(first, count, out);
  } else if (is_copy) {
    std::memcpy(out, source_.values->data() + first * element_bytes_, count * element_bytes_);
  } else {
    return source_.conversion == Conversion::kMaster ? JoinMaster(first, count, out)
                                                     : Decode(first, count, out);
  }
  return absl::OkStatus();
}

void ShardReader::CopyAverages(uint64_t first, uint64_t count, uint8_t* out) const {
  const absl::Span<const float> averages = std::as_const(*source_.values).as<float>();
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t index = format_.AxisIndex(shard_.range().begin + first + i);
    std::memcpy(out + i * sizeof(float), &averages[index - format_.axis_begin], sizeof(float));
  }
}

absl::Status ShardReader::JoinMaster(uint64_t first, uint64_t count, uint8_t* out) const {
  const absl::Span<const uint16_t> weight =
      std::as_const(*source_.values).as<uint16_t>().subspan(first, count);
  std::vector<int16_t> built;  // if the remainder is not stored as int16
  absl::Span<const int16_t> remainder;
  if (source_.secondary && source_.remainder_dtype == v1::DTYPE_I16) {
    remainder = std::as_const(*source_.secondary).as<int16_t>().subspan(first, count);
  } else {
    built.resize(count);
    // An int8 remainder is the high byte of an int16 one.
    if (source_.secondary)
      for (uint64_t i = 0; i < count; ++i)
        built[i] =
            static_cast<int16_t>(256 * std::as_const(*source_.secondary).as<int8_t>()[first + i]);
    remainder = built;
  }
  if (request_.dtype == v1::DTYPE_F32)
    return kernels::JoinMaster(weight, remainder, {reinterpret_cast<float*>(out), count});
  return JoinToF16(first, weight, remainder, out);
}

absl::Status ShardReader::JoinToF16(uint64_t first, absl::Span<const uint16_t> weight,
                                    absl::Span<const int16_t> remainder, uint8_t* out) const {
  kernels::F16Overflow overflow;
  absl::Status status = kernels::JoinMasterToF16(
      weight, remainder, {reinterpret_cast<uint16_t*>(out), weight.size()}, &overflow);
  if (!status.ok() || overflow.count == 0) return status;
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::BAD_REQUEST);
  detail.set_tensor(shard_.tensor->name);
  detail.set_limit("65504");
  return MakeError(
      absl::StatusCode::kInvalidArgument,
      absl::StrCat("tensor '", shard_.tensor->name, "': element ",
                   shard_.range().begin + first + overflow.first_index,
                   " is beyond 65504, the largest float16; pull it as float32 or bfloat16"),
      detail);
}

// Codes are decoded by whole blocks; a run may begin and end inside one.
absl::Status ShardReader::Decode(uint64_t first, uint64_t count, uint8_t* out) const {
  std::vector<float> block(kernels::kQuantBlock);
  for (uint64_t done = 0; done < count;) {
    const uint64_t index = (first + done) / kernels::kQuantBlock,
                   begin = index * kernels::kQuantBlock;
    const uint64_t size = std::min<uint64_t>(kernels::kQuantBlock, shard_.count() - begin);
    if (absl::Status decoded = DecodeBlock(index, {block.data(), size}); !decoded.ok())
      return decoded;
    const uint64_t skip = first + done - begin, take = std::min(count - done, size - skip);
    std::memcpy(out + done * sizeof(float), block.data() + skip, take * sizeof(float));
    done += take;
  }
  return absl::OkStatus();
}

absl::Status ShardReader::DecodeBlock(uint64_t index, absl::Span<float> values) const {
  const bool four_bit = format_.is_four_bit();
  const uint64_t scales = four_bit ? kernels::FourBitBlockCount(values.size()) : 1;
  constexpr float kZeros[2] = {};
  const absl::Span<const float> absmax = source_.secondary
                                             ? std::as_const(*source_.secondary)
                                                   .as<float>()
                                                   .subspan(four_bit ? 2 * index : index, scales)
                                             : absl::MakeConstSpan(kZeros).first(scales);
  const absl::Span<const uint8_t> codes = std::as_const(*source_.values).as<uint8_t>();
  const auto dequantise = four_bit ? kernels::DequantizeBlocks4 : kernels::DequantizeBlocks;
  return dequantise(CodeBookOf(request_.slot),
                    codes.subspan(index * kernels::kQuantBlock / format_.elements_per,
                                  format_.ElementCount(values.size())),
                    absmax, values);
}

}  // namespace orlop::server
