// Reading one slot of a shard at an exact version, chunk by chunk.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "base/checksum.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/shard_info.h"
#include "server/shards/slot_mapping.h"
#include "server/tiers/slot_home.h"

namespace orlop::server {

struct Shard;

struct ReadRequest {
  int32_t shard = 0;
  Slot slot = Slot::kWeight;
  // As stored, or: F32, BF16, F16 of a parameter's weight, F32 of the master or of an 8-bit or
  // 4-bit slot (decoded), U8 of such a slot. UNSPECIFIED: the manifest's for a weight, F32 for the
  // master, else as stored.
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  Box box;  // "<slot>_absmax": flat, whole blocks; one fp32 per block
  int64_t version = 0;
  uint64_t max_chunk_bytes = 1 << 20;  // a multiple of 1 MiB
};

struct ReadChunk {
  BufferPtr owner;  // keeps `bytes` alive and unchanged: release it when they were sent
  absl::Span<const uint8_t> bytes;
  uint64_t offset_bytes = 0;
  uint64_t checksum = 0;
  std::optional<Digest128> digest;  // last chunk only: of the whole piece
};

// Keeps the version's buffers until destroyed: an apply goes on into fresh ones. Not thread-safe.
// Weights in bf16 and other slots as stored are served without a copy where the box is one range.
class ShardReader {
 public:
  // A whole shard at one version.
  struct Source {
    Conversion conversion = Conversion::kCopy;
    BufferPtr values;     // null: every byte is the slot's initial byte
    BufferPtr secondary;  // remainder of a weight, absmax of codes; null: none, or zero
    v1::DType remainder_dtype = v1::DTYPE_UNSPECIFIED;  // of `secondary`, if it is one
  };
  // `request` is complete: a dtype, and a simplified box that meets the shard.
  ShardReader(const ShardInfo& shard, const SlotFormat& format, ReadRequest request, Source source,
              const SlotHome* home);

  uint64_t total_bytes() const { return part_.count() * element_bytes_; }
  v1::DType dtype() const { return request_.dtype; }
  bool done() const { return offset_bytes_ == total_bytes(); }
  // The next chunk, in order.
  //   Status  InvalidArgument (fp16 cannot hold a value: names the tensor), ResourceExhausted (no
  //           room for a built chunk: try again when sent ones were released)
  absl::StatusOr<ReadChunk> Next();

 private:
  absl::StatusOr<BufferPtr> FreeBuffer();
  bool IsRawBlocks() const;
  absl::Status Build(Range part, uint8_t* out) const;
  absl::Status BuildRun(uint64_t first, uint64_t count, uint8_t* out) const;
  void CopyAverages(uint64_t first, uint64_t count, uint8_t* out) const;
  absl::Status JoinMaster(uint64_t first, uint64_t count, uint8_t* out) const;
  absl::Status JoinToF16(uint64_t first, absl::Span<const uint16_t> weight,
                         absl::Span<const int16_t> remainder, uint8_t* out) const;
  absl::Status Decode(uint64_t first, uint64_t count, uint8_t* out) const;
  absl::Status DecodeBlock(uint64_t index, absl::Span<float> values) const;

  const ShardInfo shard_;
  const SlotFormat format_;
  const ReadRequest request_;
  const Source source_;
  const SlotHome* const home_;  // outlives this
  Range part_;                  // of the box's buffer, in elements
  uint64_t element_bytes_;
  std::optional<uint64_t> direct_offset_bytes_;  // in source_.values, when nothing needs building
  uint64_t offset_bytes_ = 0;
  PieceDigest digest_;
  std::vector<BufferPtr> built_;
};

// See ShardStore::OpenRead.
absl::StatusOr<std::unique_ptr<ShardReader>> OpenShardRead(const Shard& shard,
                                                           const ReadRequest& wanted);

}  // namespace orlop::server
