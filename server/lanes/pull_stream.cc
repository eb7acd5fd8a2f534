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

absl::Status PullStream::Run() {
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->Find(request_.job());
  if (!job.ok()) return job.status();
  job_ = *job;
  model_ = job_->model();
  place_.job = request_.job();
  const absl::Status status = SendAll();
  return status.ok() ? status : Explain(status, place_, job_->position());
}

absl::Status PullStream::SendAll() {
  if (absl::Status status = Check(); !status.ok()) return status;
  for (const v1::Region& region : request_.regions())
    if (absl::Status status = SendRegion(region); !status.ok()) return status;
  return absl::OkStatus();
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

absl::Status PullStream::SendRegion(const v1::Region& wire) {
  place_.tensor = wire.tensor().substr(0, kMaxNameBytes);
  const absl::StatusOr<Region> region = ParseRegion(*model_, wire, RegionOf::kState);
  if (!region.ok()) return region.status();
  const Tensor& tensor = model_->tensors()[region->tensor];
  bool sent = false;
  for (uint64_t shard = region->first_shard; shard <= region->last_shard; ++shard) {
    const int32_t id = model_->FirstShard(region->tensor) + static_cast<int32_t>(shard);
    if (model_->Owner(id) != jobs_->environment().self) continue;
    const Range range = ShardRange(shard, tensor.element_count, model_->shard_elements());
    if (BoxPart(region->box, tensor.shape, range).empty()) continue;
    v1::Region filled = wire;
    filled.set_shard(shard);
    if (absl::Status status = SendShard(id, *region, std::move(filled)); !status.ok())
      return status;
    sent = true;
  }
  if (sent) return absl::OkStatus();
  return MakeError(
      absl::StatusCode::kNotFound,
      absl::StrCat("no shard of '", place_.tensor, "' that the region asks for is on this server"),
      v1::ErrorDetail::NOT_OWNER);
}

// Waits for the version and opens a reader. The pin delays the apply of the shard until the reader
// is open. Then the reader holds the version's buffers, and an apply writes into fresh ones.
absl::StatusOr<std::unique_ptr<ShardReader>> PullStream::OpenPinned(const ReadRequest& request) {
  const auto pin = job_->AwaitVersion(request.shard, request.version, wait_);
  if (!pin.ok()) return pin.status();
  return job_->shards().OpenRead(request);
}

absl::Status PullStream::SendShard(int32_t id, const Region& region, v1::Region filled) {
  auto reader = OpenPinned({id, region.slot, region.dtype, region.box, version_, chunk_bytes_});
  if (!reader.ok()) return reader.status();
  filled.set_slot(SlotName(region.slot));
  filled.set_dtype((*reader)->dtype());
  ToWire(region.box, filled.mutable_box());
  v1::Chunk header;
  if (!key_sent_) *header.mutable_key() = key_;
  key_sent_ = true;
  *header.mutable_region() = std::move(filled);
  while (!(*reader)->done()) {
    absl::StatusOr<ReadChunk> chunk = (*reader)->Next();
    if (!chunk.ok()) return chunk.status();
    header.set_offset_bytes(chunk->offset_bytes);
    header.set_checksum(chunk->checksum);
    if (chunk->digest.has_value()) ToWire(*chunk->digest, header.mutable_piece_digest());
    if (absl::Status sent = sink_(&header, *chunk); !sent.ok()) return sent;
    header.Clear();
  }
  return absl::OkStatus();
}

}  // namespace orlop::server
