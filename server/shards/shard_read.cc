#include "server/shards/shard_read.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/casts.h"
#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/shards/shard.h"

namespace orlop::server {
namespace {

bool IsMaster(const ReadRequest& request, const SlotFormat& format) {
  return (request.slot == Slot::kWeight || request.slot == Slot::kMaster) &&
         format.dtype != request.dtype;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ShardReader>> ShardStore::OpenRead(const ReadRequest& wanted) {
  auto found = Find(wanted.shard);
  if (!found.ok()) return found.status();
  Shard& shard = **found;
  const Tensor& tensor = *shard.tensor;
  if (absl::Status valid = ValidateBox(wanted.box, tensor.shape, tensor.element_count); !valid.ok())
    return ShardError(valid.code(), shard, std::string(valid.message()));
  ReadRequest request = wanted;
  request.box = Simplified(wanted.box, tensor.shape);
  const Slot stored = request.slot == Slot::kMaster ? Slot::kWeight : request.slot;
  const size_t index = static_cast<size_t>(stored);
  SlotState* second = nullptr;
  ShardReader::Source source;
  SlotFormat format;
  SlotState first_view, second_view;  // what the reader holds; copied under the lock
  {
    MutexLock lock(&shard.mutex);
    if (shard.version < 0)
      return ShardError(absl::StatusCode::kFailedPrecondition, shard,
                        "no weights are committed yet", v1::ErrorDetail::LOADING);
    if (request.version < shard.version || (shard.applying && request.version == shard.version)) {
      v1::ErrorDetail detail;
      detail.set_version(shard.version);
      return Annotated(ShardError(absl::StatusCode::kOutOfRange, shard,
                                  absl::StrCat("version ", request.version, " is applied over; ",
                                               shard.version, " is current"),
                                  v1::ErrorDetail::VERSION_GONE),
                       "pull", detail);
    }
    if (request.version > shard.version)
      return ShardError(absl::StatusCode::kFailedPrecondition, shard,
                        absl::StrCat("version ", request.version, " is not made yet; ",
                                     shard.version, " is current"),
                        v1::ErrorDetail::WRONG_STEP);
    format = shard.slots[index].format;
    if (!format.exists() || (request.slot == Slot::kMaster && !tensor.is_parameter))
      return ShardError(absl::StatusCode::kInvalidArgument, shard,
                        absl::StrCat("has no slot ", SlotName(request.slot)));
    if (request.slot == Slot::kMaster && request.dtype == v1::DTYPE_UNSPECIFIED)
      request.dtype = v1::DTYPE_F32;
    if (request.dtype == v1::DTYPE_UNSPECIFIED)
      request.dtype = stored == Slot::kWeight ? tensor.dtype : format.dtype;
    const bool joins = tensor.is_parameter && stored == Slot::kWeight &&
                       (request.dtype == v1::DTYPE_F32 ||
                        (request.dtype == v1::DTYPE_F16 && request.slot == Slot::kWeight));
    const bool decodes =
        tensor.is_parameter && format.dtype == v1::DTYPE_U8 && request.dtype == v1::DTYPE_F32;
    if (!joins && !decodes && (request.dtype != format.dtype || request.slot == Slot::kMaster))
      return ShardError(absl::StatusCode::kInvalidArgument, shard,
                        absl::StrCat("cannot read ", SlotName(request.slot), " as ",
                                     std::string(DTypeName(request.dtype))));
    const size_t other = joins ? static_cast<size_t>(Slot::kRemainder) : index + 1;
    if ((joins || decodes) && shard.slots[other].format.exists()) second = &shard.slots[other];
    first_view.data = shard.slots[index].data;
    first_view.spilled = shard.slots[index].spilled;
    if (second) {
      second_view.format = second->format;
      second_view.data = second->data;
      second_view.spilled = second->spilled;
    }
  }
  if (absl::Status valid = format.CheckBox(tensor.shape, wanted.box, stored); !valid.ok())
    return ShardError(valid.code(), shard, std::string(valid.message()));
  const Range part = BoxPart(request.box, tensor.shape, shard.info.range);
  if (part.empty())
    return ShardError(absl::StatusCode::kInvalidArgument, shard,
                      absl::StrCat("box ", ToString(wanted.box), " does not touch it"));
  const bool raw_blocks = format.elements_per > 1 && request.dtype == format.dtype;
  if (raw_blocks && (!request.box.flat || request.box.offset[0] % kernels::kQuantBlock != 0))
    return ShardError(
        absl::StatusCode::kInvalidArgument, shard,
        absl::StrCat(SlotName(request.slot), " is read by flat boxes of whole blocks"));
  // A spilled value may be replaced while it is read: then the version is gone, not the data.
  auto failed = [&](const absl::Status& status) -> absl::Status {
    MutexLock lock(&shard.mutex);
    if (shard.version == request.version && !shard.applying) return status;
    return ShardError(absl::StatusCode::kOutOfRange, shard,
                      absl::StrCat("version ", request.version, " was applied over"),
                      v1::ErrorDetail::VERSION_GONE);
  };
  auto values = Contents(shard, stored, first_view);
  if (!values.ok()) return failed(values.status());
  source.values = *std::move(values);
  if (second) {
    const Slot slot = static_cast<Slot>(
        stored == Slot::kWeight ? static_cast<size_t>(Slot::kRemainder) : index + 1);
    auto secondary = Contents(shard, slot, second_view);
    if (!secondary.ok()) return failed(secondary.status());
    source.secondary = *std::move(secondary);
    source.remainder_dtype = second_view.format.dtype;
    source.has_secondary = true;
  }
  if (stored == Slot::kWeight) {
    MutexLock lock(&mutex_);
    if (request.version > pulled_version_) {
      pulled_version_ = request.version;
      pulled_before_ = std::exchange(pulled_, {});
      pulled_seen_.clear();
    }
    if (request.version == pulled_version_ && pulled_seen_.insert(shard.info.id).second)
      pulled_.push_back(shard.info.id);
  }
  return std::make_unique<ShardReader>(&tensor, shard.info, format, request, std::move(source),
                                       tiers_, layout_.job);
}

ShardReader::ShardReader(const Tensor* tensor, OwnedShard shard, SlotFormat format,
                         ReadRequest request, Source source, Tiers* tiers, std::string job)
    : tensor_(tensor),
      shard_(shard),
      format_(format),
      request_(std::move(request)),
      source_(std::move(source)),
      tiers_(tiers),
      job_(std::move(job)),
      part_(BoxPart(request_.box, tensor->shape, shard.range)),
      element_bytes_(ElementBytes(request_.dtype)) {
  if (request_.box.flat) {
    uint64_t first = std::max(request_.box.offset[0], shard.range.begin) - shard.range.begin;
    if (format_.elements_per > 1 && request_.dtype == format_.dtype) {
      part_ = {0, format_.ElementCount(part_.count())};
      first /= format_.elements_per;
    }
    if (source_.values && request_.dtype == format_.dtype &&
        format_.axis == SlotFormat::Axis::kElements)
      direct_offset_bytes_ = first * element_bytes_;
  }
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
  }
  const std::vector<uint64_t> leaves =
      LeafHashes({reinterpret_cast<const char*>(chunk.bytes.data()), size});
  chunk.checksum = ChunkChecksum(leaves);
  digest_.AddLeaves(leaves);
  offset_bytes_ += size;
  if (done()) chunk.digest = digest_.Finish();
  return chunk;
}

// A built chunk's buffer is used again when its bytes were sent: no page faults per chunk.
absl::StatusOr<BufferPtr> ShardReader::FreeBuffer() {
  for (const BufferPtr& buffer : built_)
    if (buffer.use_count() == 1) return buffer;
  auto buffer = tiers_->NewBuffer({Tier::kDram, job_, "messages"},
                                  std::min(request_.max_chunk_bytes, total_bytes()));
  if (buffer.ok()) built_.push_back(*buffer);
  return buffer;
}

// Elements [part) of the box's own buffer, run by run.
absl::Status ShardReader::Build(Range part, uint8_t* out) const {
  if (format_.elements_per > 1 && request_.dtype == format_.dtype) {
    std::memset(out, format_.initial_byte,
                part.count() * element_bytes_);  // a slot that was never written
    return absl::OkStatus();
  }
  RunIterator runs(request_.box, tensor_->shape, shard_.range);
  absl::Status status;
  for (Run run; status.ok() && runs.Next(&run);) {
    const uint64_t begin = run.box_begin, end = begin + run.count;
    if (end <= part.begin) continue;
    if (begin >= part.end) break;
    const uint64_t from = std::max(begin, part.begin), to = std::min(end, part.end);
    status = BuildRun(run.tensor_begin + (from - begin) - shard_.range.begin, to - from,
                      out + (from - part.begin) * element_bytes_);
  }
  return status;
}

absl::Status ShardReader::BuildRun(uint64_t first, uint64_t count, uint8_t* out) const {
  if (!source_.values) {  // never written: zero, whatever the code of it
    std::memset(out, request_.dtype == format_.dtype ? format_.initial_byte : 0,
                count * element_bytes_);
    return absl::OkStatus();
  }
  if (format_.axis != SlotFormat::Axis::kElements) {
    const absl::Span<const float> averages = std::as_const(*source_.values).as<float>();
    for (uint64_t i = 0; i < count; ++i) {
      const uint64_t index = format_.AxisIndex(shard_.range.begin + first + i);
      std::memcpy(out + i * sizeof(float), &averages[index - format_.axis_begin], sizeof(float));
    }
    return absl::OkStatus();
  }
  if (request_.dtype == format_.dtype) {
    std::memcpy(out, source_.values->data() + first * element_bytes_, count * element_bytes_);
    return absl::OkStatus();
  }
  if (IsMaster(request_, format_)) {
    const absl::Span<const uint16_t> weight =
        std::as_const(*source_.values).as<uint16_t>().subspan(first, count);
    std::vector<int16_t> built;  // where the remainder is not stored as int16
    absl::Span<const int16_t> remainder;
    if (source_.secondary && source_.remainder_dtype == v1::DTYPE_I16) {
      remainder = std::as_const(*source_.secondary).as<int16_t>().subspan(first, count);
    } else {
      built.resize(count);
      if (source_.secondary)
        for (uint64_t i = 0; i < count; ++i)
          built[i] =
              static_cast<int16_t>(256 * std::as_const(*source_.secondary).as<int8_t>()[first + i]);
      remainder = built;
    }
    if (request_.dtype == v1::DTYPE_F32)
      return kernels::JoinMaster(weight, remainder, {reinterpret_cast<float*>(out), count});
    kernels::F16Overflow overflow;
    absl::Status status = kernels::JoinMasterToF16(
        weight, remainder, {reinterpret_cast<uint16_t*>(out), count}, &overflow);
    if (!status.ok() || overflow.count == 0) return status;
    v1::ErrorDetail detail;
    detail.set_reason(v1::ErrorDetail::BAD_REQUEST);
    detail.set_tensor(tensor_->name);
    detail.set_limit("65504");
    return MakeError(
        absl::StatusCode::kInvalidArgument,
        absl::StrCat("tensor '", tensor_->name, "': element ",
                     shard_.range.begin + first + overflow.first_index,
                     " is beyond 65504, the largest float16; pull it as float32 or bfloat16"),
        detail);
  }
  // Codes are decoded by whole blocks; a run may begin and end inside one.
  const absl::Span<const uint8_t> codes = std::as_const(*source_.values).as<uint8_t>();
  std::vector<float> block(kernels::kQuantBlock);
  for (uint64_t done = 0; done < count;) {
    const uint64_t index = (first + done) / kernels::kQuantBlock,
                   begin = index * kernels::kQuantBlock;
    const uint64_t size = std::min<uint64_t>(kernels::kQuantBlock, shard_.range.count() - begin);
    const bool four_bit = format_.elements_per == 2;
    const uint64_t scales = four_bit ? kernels::FourBitBlockCount(size) : 1;
    constexpr float kZeros[2] = {};
    const absl::Span<const float> absmax = source_.secondary
                                               ? std::as_const(*source_.secondary)
                                                     .as<float>()
                                                     .subspan(four_bit ? 2 * index : index, scales)
                                               : absl::MakeConstSpan(kZeros).first(scales);
    const auto dequantise = four_bit ? kernels::DequantizeBlocks4 : kernels::DequantizeBlocks;
    absl::Status status =
        dequantise(CodeBookOf(request_.slot),
                   codes.subspan(begin / format_.elements_per, format_.ElementCount(size)), absmax,
                   {block.data(), size});
    if (!status.ok()) return status;
    const uint64_t skip = first + done - begin, take = std::min(count - done, size - skip);
    std::memcpy(out + done * sizeof(float), block.data() + skip, take * sizeof(float));
    done += take;
  }
  return absl::OkStatus();
}

}  // namespace orlop::server
