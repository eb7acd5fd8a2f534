// One push, 5 of 8 (ARCHITECTURE.md); next: server/runtime/job_runtime.cc
#include "server/lanes/push_stream.h"

#include "absl/strings/str_cat.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/job/contributions.h"
#include "server/runtime/answers.h"

namespace orlop::server {

absl::Status PushStream::Explain(const absl::Status& status) const {
  if (status.ok() || job_ == nullptr) return status;
  const absl::Status placed = WithPosition(status, job_->position(), key_.job());
  v1::ErrorDetail detail = DetailOf(placed);
  if (detail.tensor().empty()) detail.set_tensor(tensor_);
  if (shard_.has_value()) detail.set_shard(*shard_);
  return MakeError(placed.code(), std::string(placed.message()), detail);
}

absl::Status PushStream::Open(const v1::StreamKey& key) {
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->Find(key.job());
  if (!job.ok()) return job.status();
  job_ = *job;
  model_ = job_->model();
  key_ = key;
  return CheckLossScale(key.loss_scale());
}

absl::Status PushStream::Take(const DecodedChunk& chunk) {
  const v1::Chunk& header = chunk.header;
  if (job_ == nullptr) {
    if (!header.has_key()) {
      return MakeError(absl::StatusCode::kInvalidArgument,
                       "the first message of a stream carries `key`", v1::ErrorDetail::BAD_REQUEST);
    }
    if (absl::Status status = Open(header.key()); !status.ok()) return Explain(status);
    if (!header.has_region() && chunk.payload_bytes == 0) return absl::OkStatus();
  } else if (header.has_key()) {
    return Explain(absl::InvalidArgumentError("only the first message of a stream carries `key`"));
  }
  if (header.has_region()) {
    if (writer_ != nullptr) {
      return Explain(absl::InvalidArgumentError(
          absl::StrCat("a new piece begins after ", writer_->written_bytes(), " of the ",
                       writer_->total_bytes(), " bytes of the piece of '", tensor_, "'")));
    }
    if (absl::Status status = BeginPiece(header); !status.ok()) return Explain(status);
  }
  if (writer_ == nullptr)
    return Explain(absl::InvalidArgumentError("the first chunk of a piece carries `region`"));
  std::vector<absl::Span<const uint8_t>> slices;
  slices.reserve(chunk.payload.size());
  for (const grpc::Slice& slice : chunk.payload) slices.emplace_back(slice.begin(), slice.size());
  if (absl::Status status = writer_->WriteChunk(header.offset_bytes(), slices, header.checksum());
      !status.ok()) {
    return Explain(status);
  }
  response_.set_byte_count(response_.byte_count() + chunk.payload_bytes);
  const bool last = writer_->written_bytes() == writer_->total_bytes();
  if (last != header.has_piece_digest()) {
    return Explain(absl::InvalidArgumentError(absl::StrCat(
        "tensor '", tensor_, "': `piece_digest` belongs on the last chunk of a piece, after ",
        writer_->written_bytes(), " of ", writer_->total_bytes(), " bytes")));
  }
  return last ? Explain(EndPiece({header.piece_digest().high(), header.piece_digest().low()}))
              : absl::OkStatus();
}

absl::Status PushStream::BeginPiece(const v1::Chunk& header) {
  const v1::Region& region = header.region();
  tensor_ = region.tensor().substr(0, kMaxNameBytes);
  shard_.reset();
  absl::StatusOr<uint32_t> tensor = model_->FindTensor(region.tensor());
  if (!tensor.ok()) return tensor.status();
  const uint64_t shard_count = model_->ShardCountOf(*tensor);
  if (!region.has_shard() && shard_count != 1) {
    return absl::InvalidArgumentError(absl::StrCat("tensor '", tensor_, "' has ", shard_count,
                                                   " shards: `shard` must say which"));
  }
  if (region.shard() >= shard_count) {
    return absl::InvalidArgumentError(absl::StrCat("tensor '", tensor_, "' has no shard ",
                                                   region.shard(), "; it has ", shard_count));
  }
  shard_ = region.shard();
  absl::StatusOr<Box> box =
      NormalBox(model_->tensors()[*tensor], region.has_box() ? &region.box() : nullptr);
  if (!box.ok()) return box.status();
  const int32_t id = model_->FirstShard(*tensor) + static_cast<int32_t>(region.shard());
  if (model_->Owner(id) != jobs_->environment().self) {
    v1::ErrorDetail detail;
    detail.set_reason(v1::ErrorDetail::NOT_OWNER);
    detail.set_server(jobs_->environment().server_names[model_->Owner(id)]);
    return MakeError(absl::StatusCode::kNotFound,
                     absl::StrCat("shard ", region.shard(), " of '", tensor_,
                                  "' belongs to server ", detail.server()),
                     detail);
  }
  if (absl::Status status = job_->AwaitAttempt(key_, wait_); !status.ok()) return status;
  piece_ = {};
  piece_.key = {static_cast<int64_t>(key_.generation()), key_.step(),
                static_cast<int64_t>(key_.attempt()),    id,
                static_cast<step::Rank>(key_.rank()),    0};
  piece_.epoch = static_cast<int64_t>(key_.epoch());
  piece_.is_load = is_load_;
  piece_.scale = key_.loss_scale() == 0 ? 1.0 : key_.loss_scale();
  return is_load_ ? BeginLoad(*tensor, region.shard(), *box, header)
                  : BeginGradient(*tensor, region.shard(), *box, region);
}

absl::Status PushStream::BeginGradient(uint32_t tensor, uint64_t, const Box& box,
                                       const v1::Region& region) {
  if (!region.slot().empty() && region.slot() != "gradient") {
    return absl::InvalidArgumentError(absl::StrCat("tensor '", tensor_,
                                                   "': Push sends slot 'gradient', not '",
                                                   region.slot().substr(0, kMaxNameBytes), "'"));
  }
  if (piece_.key.generation != 0 && job_->position().generation != piece_.key.generation) {
    // Told before the layout is asked, which may be another generation's.
    if (absl::Status status = job_->CheckPush(piece_); !status.ok()) return status;
  }
  absl::StatusOr<int32_t> id = job_->RegionOf(tensor, key_.rank(), box);
  if (!id.ok()) return id.status();
  piece_.key.region = static_cast<uint64_t>(*id);
  if (absl::Status status = job_->CheckPush(piece_); !status.ok()) return status;
  const v1::DType dtype =
      region.dtype() == v1::DTYPE_UNSPECIFIED ? model_->tensors()[tensor].dtype : region.dtype();
  auto writer = job_->shards().BeginGradient(piece_.key.shard, key_.rank(), *id, dtype);
  if (!writer.ok()) return writer.status();
  writer_ = *std::move(writer);
  return absl::OkStatus();
}

absl::Status PushStream::BeginLoad(uint32_t tensor, uint64_t, const Box& box,
                                   const v1::Chunk& header) {
  const v1::Region& region = header.region();
  absl::StatusOr<Slot> slot = ParseSlot(region.slot());
  if (!slot.ok()) return slot.status();
  piece_.key.region = step::LoadRegion(SlotName(*slot), box);
  if (header.has_applied_count()) {
    if (header.applied_count() > kMaxAppliedCount) {
      return absl::InvalidArgumentError(absl::StrCat("applied_count ", header.applied_count(),
                                                     "; the limit is ", kMaxAppliedCount));
    }
    piece_.applied_count = static_cast<int64_t>(header.applied_count());
  }
  if (absl::Status status = job_->CheckPush(piece_); !status.ok()) return status;
  const v1::DType dtype =
      region.dtype() == v1::DTYPE_UNSPECIFIED ? model_->tensors()[tensor].dtype : region.dtype();
  auto writer = job_->shards().BeginLoad(piece_.key.shard, *slot, dtype, box);
  if (!writer.ok()) return writer.status();
  writer_ = *std::move(writer);
  return absl::OkStatus();
}

absl::Status PushStream::EndPiece(const Digest128& digest) {
  absl::StatusOr<PieceResult> result = writer_->Finish(digest);
  if (!result.ok()) return result.status();
  piece_.payload = {result->digest.high, result->digest.low};
  bool repeated = false;
  if (absl::Status status = job_->Push(piece_, writer_.get(), &repeated, wait_); !status.ok())
    return status;
  writer_.reset();
  response_.set_piece_count(response_.piece_count() + 1);
  if (repeated) response_.set_repeated_count(response_.repeated_count() + 1);
  return absl::OkStatus();
}

absl::Status PushStream::Finish() {
  if (job_ == nullptr) return absl::InvalidArgumentError("the stream was empty");
  if (writer_ != nullptr) {
    return Explain(absl::InvalidArgumentError(
        absl::StrCat("the stream ends after ", writer_->written_bytes(), " of the ",
                     writer_->total_bytes(), " bytes of the piece of '", tensor_, "'")));
  }
  return absl::OkStatus();
}

}  // namespace orlop::server
