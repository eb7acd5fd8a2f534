// One push, 3 of 8 (ARCHITECTURE.md); next: server/runtime/job_runtime.cc
#include "server/lanes/push_stream.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/checksum.h"
#include "orlop/v1/types.pb.h"
#include "proto/chunk.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/lanes/region.h"
#include "server/runtime/answers.h"
#include "server/runtime/environment.h"
#include "server/runtime/job_table.h"
#include "server/runtime/wait.h"
#include "server/step/layout.h"

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

PushStream::Taken PushStream::Take(const DecodedChunk& chunk,
                                   const std::shared_ptr<Wakeup>& wakeup) {
  Taken taken = Begin(chunk, wakeup);
  is_again_ = taken.is_later;
  const v1::Chunk& header = chunk.header;
  const bool is_key_alone = header.has_key() && !header.has_region() && chunk.payload_bytes == 0;
  if (taken.status.ok() && !is_key_alone) taken.status = Write(chunk);
  taken.status = Explained(taken.status);
  return taken;
}

// Takes note of what the header of a chunk begins: the stream, and a piece.
PushStream::Taken PushStream::Begin(const DecodedChunk& chunk,
                                    const std::shared_ptr<Wakeup>& wakeup) {
  const v1::Chunk& header = chunk.header;
  if (job_ == nullptr) {
    if (!header.has_key()) {
      return {false, MakeError(absl::StatusCode::kInvalidArgument,
                               "the first message of a stream carries `key`",
                               v1::ErrorDetail::BAD_REQUEST)};
    }
    if (absl::Status status = Open(header.key()); !status.ok()) return {false, status};
  } else if (header.has_key() && !is_again_) {
    return {false, absl::InvalidArgumentError("only the first message of a stream carries `key`")};
  }
  if (!header.has_region()) return {};
  if (ticket_.has_value()) {
    return {false,
            absl::InvalidArgumentError(absl::StrCat(
                "a new piece begins after ", ticket_->writer->written_bytes(), " of the ",
                ticket_->writer->total_bytes(), " bytes of the piece of '", place_.tensor, "'"))};
  }
  place_.tensor = Beginning(header.region().tensor(), kMaxNameBytes);
  place_.shard.reset();
  const absl::StatusOr<PieceRequest> request = RequestOf(header);
  if (!request.ok()) return {false, request.status()};
  BegunPiece begun = job_->BeginPiece(*request, wakeup);
  if (begun.ticket.has_value()) ticket_ = std::move(begun.ticket);
  return {begun.is_later, std::move(begun.status)};
}

absl::Status PushStream::Write(const DecodedChunk& chunk) {
  const v1::Chunk& header = chunk.header;
  if (!ticket_.has_value())
    return absl::InvalidArgumentError("the first chunk of a piece carries `region`");
  std::vector<absl::Span<const uint8_t>> slices;
  slices.reserve(chunk.payload.size());
  for (const grpc::Slice& slice : chunk.payload) slices.emplace_back(slice.begin(), slice.size());
  if (absl::Status status =
          ticket_->writer->WriteChunk(header.offset_bytes(), slices, header.checksum());
      !status.ok()) {
    return status;
  }
  response_.set_byte_count(response_.byte_count() + chunk.payload_bytes);
  const bool last = ticket_->writer->written_bytes() == ticket_->writer->total_bytes();
  if (last != header.has_piece_digest()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor '", place_.tensor, "': `piece_digest` belongs on the last chunk of a piece, after ",
        ticket_->writer->written_bytes(), " of ", ticket_->writer->total_bytes(), " bytes"));
  }
  return last ? EndPiece({header.piece_digest().high(), header.piece_digest().low()})
              : absl::OkStatus();
}

absl::StatusOr<PieceRequest> PushStream::RequestOf(const v1::Chunk& header) {
  const absl::StatusOr<Region> region =
      ParseRegion(*model_, header.region(), is_load_ ? RegionOf::kState : RegionOf::kGradient);
  if (!region.ok()) return region.status();
  place_.shard = region->first_shard;
  const Environment& environment = jobs_->environment();
  absl::Status owned = CheckOnePiece(*model_, *region, environment.self, environment.server_names);
  if (!owned.ok()) return owned;
  PieceRequest request;
  request.key = KeyOf(key_);
  request.rank = static_cast<step::Rank>(key_.rank());
  request.loss_scale = key_.loss_scale() == 0 ? 1.0 : key_.loss_scale();
  request.tensor = region->tensor;
  request.shard = region->shard_id(*model_);
  request.box = region->box;
  request.dtype = region->dtype == v1::DTYPE_UNSPECIFIED ? model_->tensors()[region->tensor].dtype
                                                         : region->dtype;
  request.is_load = is_load_;
  request.slot = region->slot;
  if (!is_load_ || !header.has_applied_count()) return request;
  if (header.applied_count() > kMaxAppliedCount)
    return absl::InvalidArgumentError(absl::StrCat("applied_count ", header.applied_count(),
                                                   "; the limit is ", kMaxAppliedCount));
  request.applied_count = static_cast<int64_t>(header.applied_count());
  return request;
}

absl::Status PushStream::EndPiece(const Digest128& digest) {
  absl::StatusOr<bool> is_repeated =
      job_->EndPiece(*std::exchange(ticket_, std::nullopt), digest, wait_);
  if (!is_repeated.ok()) return is_repeated.status();
  response_.set_piece_count(response_.piece_count() + 1);
  if (*is_repeated) response_.set_repeated_count(response_.repeated_count() + 1);
  return absl::OkStatus();
}

absl::Status PushStream::Finish() {
  if (job_ == nullptr)
    return MakeError(absl::StatusCode::kInvalidArgument, "the stream was empty",
                     v1::ErrorDetail::BAD_REQUEST);
  if (ticket_.has_value()) {
    return Explained(absl::InvalidArgumentError(absl::StrCat(
        "the stream ends after ", ticket_->writer->written_bytes(), " of the ",
        ticket_->writer->total_bytes(), " bytes of the piece of '", place_.tensor, "'")));
  }
  return absl::OkStatus();
}

}  // namespace orlop::server
