// One pull, 3 of 4 (ARCHITECTURE.md); next: server/shards/shard_read.cc
#include "server/lanes/pull_stream.h"

#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "base/checksum.h"
#include "orlop/v1/types.pb.h"
#include "proto/convert.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/job/slots.h"
#include "server/lanes/region.h"
#include "server/runtime/job_table.h"
#include "server/shards/shard_store.h"
#include "server/step/actions.h"
#include "server/step/reason.h"

namespace orlop::server {

absl::Status PullStream::Start() {
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->Find(request_.job());
  if (!job.ok()) return job.status();
  job_ = *job;
  model_ = job_->model();
  place_.job = request_.job();
  return Check();
}

absl::Status PullStream::Explained(const absl::Status& status) const {
  return status.ok() || job_ == nullptr ? status : Explain(status, place_, job_->position());
}

absl::StatusOr<PullStream::Next> PullStream::Advance() {
  if (job_ == nullptr)
    if (absl::Status status = Start(); !status.ok()) return Explained(status);
  for (;;) {
    if (reader_ != nullptr && !reader_->done()) {
      absl::StatusOr<Next> chunk = NextChunk();
      if (!chunk.ok()) return Explained(chunk.status());
      return chunk;
    }
    if (reader_ != nullptr) {
      reader_ = nullptr;
      ++shard_;
    }
    if (!region_.has_value()) {
      if (region_index_ == request_.regions_size()) return Next();
      if (absl::Status status = BeginRegion(); !status.ok()) return Explained(status);
    }
    if (FindShard()) {
      Next next;
      next.what = Next::What::kVersion;
      next.shard = ShardId();
      next.version = version_;
      return next;
    }
    if (!found_shard_) {
      return Explained(MakeError(absl::StatusCode::kNotFound,
                                 absl::StrCat("no shard of '", place_.tensor,
                                              "' that the region asks for is on this server"),
                                 v1::ErrorDetail::NOT_OWNER));
    }
    region_.reset();
  }
}

absl::Status PullStream::Check() {
  const step::Position position = job_->position();
  const auto epoch = static_cast<int64_t>(request_.epoch());
  if (epoch != 0 && epoch < position.epoch) return step::StaleEpoch(epoch, position.epoch);
  if (request_.regions_size() < 1 ||
      request_.regions_size() > static_cast<int>(kMaxRegionsPerPull)) {
    return absl::InvalidArgumentError(
        absl::StrCat(request_.regions_size(), " regions; a pull has 1 to ", kMaxRegionsPerPull));
  }
  chunk_bytes_ = request_.max_chunk_bytes() == 0 ? kDefaultChunkBytes : request_.max_chunk_bytes();
  if (chunk_bytes_ > kMaxChunkBytes || chunk_bytes_ % kLeafBytes != 0) {
    return absl::InvalidArgumentError(absl::StrCat("max_chunk_bytes ", chunk_bytes_,
                                                   " must be a multiple of ", kLeafBytes, " up to ",
                                                   kMaxChunkBytes));
  }
  version_ = request_.has_version() ? request_.version() : position.committed_step;
  if (!request_.has_version() && version_ < 0) {
    return MakeError(absl::StatusCode::kFailedPrecondition,
                     absl::StrCat("job '", request_.job(), "' is LOADING"),
                     v1::ErrorDetail::LOADING);
  }
  key_.set_job(request_.job());
  key_.set_epoch(static_cast<uint64_t>(position.epoch));
  key_.set_generation(static_cast<uint64_t>(position.generation));
  key_.set_step(version_);
  return absl::OkStatus();
}

absl::Status PullStream::BeginRegion() {
  const v1::Region& wire = request_.regions(region_index_++);
  place_.tensor = Beginning(wire.tensor(), kMaxNameBytes);
  absl::StatusOr<Region> region = ParseRegion(*model_, wire, RegionOf::kState);
  if (!region.ok()) return region.status();
  region_ = *std::move(region);
  shard_ = region_->first_shard;
  found_shard_ = false;
  return absl::OkStatus();
}

// Goes on to the next shard of the region that is on this server, from shard_ on. Returns whether
// there is one.
bool PullStream::FindShard() {
  const Tensor& tensor = model_->tensors()[region_->tensor];
  for (; shard_ <= region_->last_shard; ++shard_) {
    const int32_t id = model_->FirstShard(region_->tensor) + static_cast<int32_t>(shard_);
    if (model_->Owner(id) != jobs_->environment().self) continue;
    const Range range = ShardRange(shard_, tensor.element_count, model_->shard_elements());
    if (BoxPart(region_->box, tensor.shape, range).empty()) continue;
    found_shard_ = true;
    return true;
  }
  return false;
}

int32_t PullStream::ShardId() const {
  return model_->FirstShard(region_->tensor) + static_cast<int32_t>(shard_);
}

// Returns what is read of the shard under way.
ReadRequest PullStream::Read() const {
  return {ShardId(), region_->slot, region_->dtype, region_->box, version_, chunk_bytes_};
}

absl::Status PullStream::Open(const absl::StatusOr<JobRuntime::VersionPin>& pin) {
  if (!pin.ok()) return Explained(pin.status());
  auto reader = job_->shards().OpenRead(Read());
  if (!reader.ok()) return Explained(reader.status());
  reader_ = *std::move(reader);
  filled_ = request_.regions(region_index_ - 1);
  filled_.set_shard(shard_);
  filled_.set_slot(SlotName(region_->slot));
  filled_.set_dtype(reader_->dtype());
  ToWire(region_->box, filled_.mutable_box());
  return absl::OkStatus();
}

absl::StatusOr<PullStream::Next> PullStream::NextChunk() {
  absl::StatusOr<ReadChunk> chunk = reader_->Next();
  if (!chunk.ok()) return chunk.status();
  Next next;
  next.what = Next::What::kChunk;
  if (!std::exchange(key_sent_, true)) *next.header.mutable_key() = key_;
  if (chunk->offset_bytes == 0) *next.header.mutable_region() = std::move(filled_);
  next.header.set_offset_bytes(chunk->offset_bytes);
  next.header.set_checksum(chunk->checksum);
  if (chunk->digest.has_value()) ToWire(*chunk->digest, next.header.mutable_piece_digest());
  next.chunk = *std::move(chunk);
  return next;
}

}  // namespace orlop::server
