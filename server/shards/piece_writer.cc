// One push, 5 of 8 (ARCHITECTURE.md); next: server/step/leader.cc
#include "server/shards/piece_writer.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/checksum.h"
#include "kernels/reduce.h"
#include "kernels/types.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"

namespace orlop::server {
namespace {

// A strip of this size is hashed, then copied and added to the norm, while it is in the first-level
// cache. It has whole 256-blocks of any float.
constexpr uint64_t kStripBytes = 4 << 10;

}  // namespace

PieceWriter::PieceWriter(Options options, std::unique_ptr<PieceSink> sink,
                         std::unique_ptr<PieceClaim> claim)
    : options_(std::move(options)),
      sink_(std::move(sink)),
      claim_(std::move(claim)),
      destination_(sink_->Destination()) {
  if (destination_ == nullptr) block_.resize(std::min(options_.sink_bytes, options_.total_bytes));
}

absl::Status PieceWriter::WriteChunk(uint64_t offset_bytes,
                                     absl::Span<const absl::Span<const uint8_t>> slices,
                                     uint64_t checksum) {
  if (state_ != State::kWriting)
    return absl::FailedPreconditionError(absl::StrCat(options_.name, ": no chunk is awaited"));
  state_ = State::kFailed;  // until the whole chunk has been checked
  uint64_t size = 0;
  for (const auto& slice : slices) size += slice.size();
  if (offset_bytes != written_bytes_)
    return MakeError(
        absl::StatusCode::kInvalidArgument,
        absl::StrCat(options_.name, ": chunk at offset ", offset_bytes, "; expected ",
                     written_bytes_,
                     offset_bytes < written_bytes_ ? " (repeated)" : " (missing or out of order)"),
        v1::ErrorDetail::BAD_REQUEST);
  if (size == 0 || size > kMaxChunkBytes || size > options_.total_bytes - written_bytes_ ||
      (size % kLeafBytes != 0 && written_bytes_ + size != options_.total_bytes))
    return MakeError(
        absl::StatusCode::kInvalidArgument,
        absl::StrCat(options_.name, ": chunk of ", size, " bytes at offset ", offset_bytes,
                     " of a piece of ", options_.total_bytes, "; chunks are whole MiB, at most ",
                     kMaxChunkBytes, ", but at the end of the piece"),
        v1::ErrorDetail::BAD_REQUEST);
  // An error of the sink counts only if the checksum is right: damaged bytes must be sent again.
  absl::Status sunk;
  for (const absl::Span<const uint8_t> slice : slices) {
    if (destination_ != nullptr) {
      CopyToDestination(slice);
    } else {
      hasher_.Add(slice.data(), slice.size());
      if (sunk.ok()) sunk = PassToSink(slice);
    }
  }
  const std::vector<uint64_t> leaves = hasher_.Finish();
  const uint64_t actual = ChunkChecksum(leaves);
  if (actual != checksum)
    return MakeError(absl::StatusCode::kAborted,
                     absl::StrCat(options_.name, ": chunk at offset ", offset_bytes,
                                  " has checksum ", actual, "; the sender said ", checksum),
                     v1::ErrorDetail::CHECKSUM);
  if (!sunk.ok()) return sunk;
  digest_.AddLeaves(leaves);
  state_ = State::kWriting;
  return absl::OkStatus();
}

// Slices may end anywhere. A strip inside one slice is copied and summed in one pass. Any other
// strip is copied part by part, and summed in the destination.
void PieceWriter::CopyToDestination(absl::Span<const uint8_t> slice) {
  const uint64_t element_bytes = kernels::SizeOf(options_.dtype);
  while (!slice.empty()) {
    const auto part =
        slice.first(std::min<uint64_t>(slice.size(), kStripBytes - written_bytes_ % kStripBytes));
    slice.remove_prefix(part.size());
    hasher_.Add(part.data(), part.size());
    uint8_t* const to = destination_ + written_bytes_;
    written_bytes_ += part.size();
    const uint64_t strip_bytes = written_bytes_ - consumed_bytes_;
    const bool is_whole =
        written_bytes_ % kStripBytes == 0 || written_bytes_ == options_.total_bytes;
    if (options_.reduce && is_whole && strip_bytes == part.size()) {
      kernels::CopyAndReduce(to, {options_.dtype, part.data(), strip_bytes / element_bytes},
                             &result_.sums);
    } else {
      std::memcpy(to, part.data(), part.size());
      if (options_.reduce && is_whole)
        kernels::ReduceGradient(
            {options_.dtype, destination_ + consumed_bytes_, strip_bytes / element_bytes},
            &result_.sums);
    }
    if (is_whole) consumed_bytes_ = written_bytes_;
  }
}

absl::Status PieceWriter::PassToSink(absl::Span<const uint8_t> slice) {
  while (!slice.empty()) {
    const uint64_t pending = written_bytes_ - consumed_bytes_;
    const size_t take = std::min<uint64_t>(slice.size(), options_.sink_bytes - pending);
    std::memcpy(block_.data() + pending, slice.data(), take);
    slice.remove_prefix(take);
    written_bytes_ += take;
    const absl::Span<const uint8_t> block(block_.data(), pending + take);
    if (block.size() < options_.sink_bytes && written_bytes_ < options_.total_bytes) continue;
    if (options_.reduce)
      kernels::ReduceGradient(
          {options_.dtype, block.data(), block.size() / kernels::SizeOf(options_.dtype)},
          &result_.sums);
    if (absl::Status status = sink_->Write(consumed_bytes_, block); !status.ok()) return status;
    consumed_bytes_ = written_bytes_;
  }
  return absl::OkStatus();
}

absl::StatusOr<PieceResult> PieceWriter::Finish(const Digest128& digest) {
  if (state_ != State::kWriting)
    return absl::FailedPreconditionError(absl::StrCat(options_.name, ": piece was lost"));
  state_ = State::kFailed;
  if (written_bytes_ != options_.total_bytes)
    return MakeError(absl::StatusCode::kInvalidArgument,
                     absl::StrCat(options_.name, ": piece ends after ", written_bytes_, " of ",
                                  options_.total_bytes, " bytes"),
                     v1::ErrorDetail::BAD_REQUEST);
  result_.digest = digest_.Finish();
  if (result_.digest != digest)
    return MakeError(absl::StatusCode::kAborted,
                     absl::StrCat(options_.name, ": piece has digest ", ToString(result_.digest),
                                  "; the sender said ", ToString(digest)),
                     v1::ErrorDetail::CHECKSUM);
  state_ = State::kFinished;
  return result_;
}

absl::Status PieceWriter::Keep() {
  if (state_ != State::kFinished)
    return absl::FailedPreconditionError(absl::StrCat(options_.name, ": not finished"));
  absl::Status kept = claim_ ? claim_->Keep(result_) : absl::OkStatus();
  state_ = kept.ok() ? State::kKept : State::kFailed;
  return kept;
}

void PieceWriter::Settle() {
  if (state_ != State::kKept) return;
  sink_.reset();
  if (claim_) claim_->Settle();
}

}  // namespace orlop::server
