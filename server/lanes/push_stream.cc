// One push, 5 of 8 (ARCHITECTURE.md); next: server/runtime/job_runtime.cc
#include "server/lanes/push_stream.h"

#include "absl/strings/str_cat.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/job/contributions.h"
#include "server/runtime/answers.h"

namespace orlop::server {

absl::Status PushStream::Explained(const absl::Status& status) const {
  return status.ok() || job_ == nullptr ? status : Explain(status, place_, job_->position());
}

absl::Status PushStream::Open(const v1::StreamKey& key) {
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->Find(key.job());
  if (!job.ok()) return job.status();
  job_ = *job;
  model_ = job_->model();
  key_ = key;
  place_.job = key.job();
  return CheckLossScale(key.loss_scale());
}

absl::Status PushStream::Take(const DecodedChunk& chunk) {
  const v1::Chunk& header = chunk.header;
  if (job_ == nullptr) {
    if (!header.has_key()) {
      return MakeError(absl::StatusCode::kInvalidArgument,
                       "the first message of a stream carries `key`", v1::ErrorDetail::BAD_REQUEST);
    }
    if (absl::Status status = Open(header.key()); !status.ok()) return Explained(status);
    if (!header.has_region() && chunk.payload_bytes == 0) return absl::OkStatus();
  } else if (header.has_key()) {
    return Explained(
        absl::InvalidArgumentError("only the first message of a stream carries `key`"));
  }
  if (header.has_region()) {
    if (writer_ != nullptr) {
      return Explained(absl::InvalidArgumentError(
          absl::StrCat("a new piece begins after ", writer_->written_bytes(), " of the ",
                       writer_->total_bytes(), " bytes of the piece of '", place_.tensor, "'")));
    }
    if (absl::Status status = BeginPiece(header); !status.ok()) return Explained(status);
  }
  if (writer_ == nullptr)
    return Explained(absl::InvalidArgumentError("the first chunk of a piece carries `region`"));
  std::vector<absl::Span<const uint8_t>> slices;
  slices.reserve(chunk.payload.size());
  for (const grpc::Slice& slice : chunk.payload) slices.emplace_back(slice.begin(), slice.size());
  if (absl::Status status = writer_->WriteChunk(header.offset_bytes(), slices, header.checksum());
      !status.ok()) {
    return Explained(status);
  }
  response_.set_byte_count(response_.byte_count() + chunk.payload_bytes);
  const bool last = writer_->written_bytes() == writer_->total_bytes();
  if (last != header.has_piece_digest()) {
    return Explained(absl::InvalidArgumentError(absl::StrCat(
        "tensor '", place_.tensor, "': `piece_digest` belongs on the last chunk of a piece, after ",
        writer_->written_bytes(), " of ", writer_->total_bytes(), " bytes")));
  }
  return last ? Explained(EndPiece({header.piece_digest().high(), header.piece_digest().low()}))
              : absl::OkStatus();
}

absl::Status PushStream::BeginPiece(const v1::Chunk& header) {
  place_.tensor = header.region().tensor().substr(0, kMaxNameBytes);
  place_.shard.reset();
  const absl::StatusOr<Region> region =
      ParseRegion(*model_, header.region(), is_load_ ? RegionOf::kState : RegionOf::kGradient);
  if (!region.ok()) return region.status();
  place_.shard = region->first_shard;
  const Environment& environment = jobs_->environment();
  if (absl::Status status =
          CheckOnePiece(*model_, *region, environment.self, environment.server_names);
      !status.ok())
    return status;
  if (absl::Status status = job_->AwaitAttempt(key_, wait_); !status.ok()) return status;
  piece_ = {};
  piece_.key = {static_cast<int64_t>(key_.generation()), key_.step(),
                static_cast<int64_t>(key_.attempt()),    region->shard_id(*model_),
                static_cast<step::Rank>(key_.rank()),    0};
  piece_.epoch = static_cast<int64_t>(key_.epoch());
  piece_.is_load = is_load_;
  piece_.scale = key_.loss_scale() == 0 ? 1.0 : key_.loss_scale();
  const v1::DType dtype = region->dtype == v1::DTYPE_UNSPECIFIED
                              ? model_->tensors()[region->tensor].dtype
                              : region->dtype;
  return is_load_ ? BeginLoad(*region, dtype, header) : BeginGradient(*region, dtype);
}

absl::Status PushStream::BeginGradient(const Region& region, v1::DType dtype) {
  if (piece_.key.generation != 0 && job_->position().generation != piece_.key.generation) {
    // The layout may already be another generation's.
    if (absl::Status status = job_->CheckPush(piece_); !status.ok()) return status;
  }
  absl::StatusOr<int32_t> id = job_->RegionOf(region.tensor, key_.rank(), region.box);
  if (!id.ok()) return id.status();
  piece_.key.region = static_cast<uint64_t>(*id);
  if (absl::Status status = job_->CheckPush(piece_); !status.ok()) return status;
  auto writer = job_->shards().BeginGradient(piece_.key.shard, key_.rank(), *id, dtype);
  if (!writer.ok()) return writer.status();
  writer_ = *std::move(writer);
  return absl::OkStatus();
}

absl::Status PushStream::BeginLoad(const Region& region, v1::DType dtype, const v1::Chunk& header) {
  piece_.key.region = step::LoadRegion(SlotName(region.slot), region.box);
  if (header.has_applied_count()) {
    if (header.applied_count() > kMaxAppliedCount) {
      return absl::InvalidArgumentError(absl::StrCat("applied_count ", header.applied_count(),
                                                     "; the limit is ", kMaxAppliedCount));
    }
    piece_.applied_count = static_cast<int64_t>(header.applied_count());
  }
  if (absl::Status status = job_->CheckPush(piece_); !status.ok()) return status;
  auto writer = job_->shards().BeginLoad(piece_.key.shard, region.slot, dtype, region.box);
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
  writer_->Settle();
  writer_.reset();
  response_.set_piece_count(response_.piece_count() + 1);
  if (repeated) response_.set_repeated_count(response_.repeated_count() + 1);
  return absl::OkStatus();
}

absl::Status PushStream::Finish() {
  if (job_ == nullptr) return absl::InvalidArgumentError("the stream was empty");
  if (writer_ != nullptr) {
    return Explained(absl::InvalidArgumentError(
        absl::StrCat("the stream ends after ", writer_->written_bytes(), " of the ",
                     writer_->total_bytes(), " bytes of the piece of '", place_.tensor, "'")));
  }
  return absl::OkStatus();
}

}  // namespace orlop::server
