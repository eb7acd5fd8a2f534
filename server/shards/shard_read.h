// Reads one slot of a shard at an exact version, chunk by chunk.
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
#include "server/tiers/served_hashes.h"
#include "server/tiers/slot_home.h"

namespace orlop::server {

struct Shard;

struct ReadRequest {
  // The shard's id.
  int32_t shard = 0;
  Slot slot = Slot::kWeight;
  // A parameter's weight can be read as F32, BF16 (stored) or F16, the master as F32, an 8-bit or
  // 4-bit slot as F32 (decoded) or U8 (stored), and every other slot as it is stored. UNSPECIFIED:
  // the manifest's dtype for a weight, F32 for the master, otherwise the stored dtype.
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  // Elements of the tensor. A slot "<state>_absmax", and codes as U8, are read by flat boxes that
  // begin at a block; an absmax has one fp32 value for each block.
  Box box;
  int64_t version = 0;
  // A multiple of 1 MiB.
  uint64_t max_chunk_bytes = 1 << 20;
};

struct ReadChunk {
  // Keeps `bytes` alive and unchanged. Release it when they have been sent, so that the reader can
  // use the buffer again.
  BufferPtr owner;
  absl::Span<const uint8_t> bytes;
  // Offset of the chunk in the piece.
  uint64_t offset_bytes = 0;
  // `bytes` were built for this chunk. If not, they are the slot's own.
  bool is_built = false;
  // ChunkChecksum of the leaves (base/checksum.h).
  uint64_t checksum = 0;
  // The digest of the whole piece; only in its last chunk.
  std::optional<Digest128> digest;
};

// Reads the part of a box inside one shard. A reader keeps the buffers of its version until it is
// destroyed; an apply meanwhile writes to fresh buffers. If the box is flat and the stored dtype is
// asked for, chunks are parts of the slot's own buffer; otherwise they are built in buffers of
// "messages". Not thread-safe.
class ShardReader {
 public:
  // The stored slots of a whole shard at one version, from which values are built.
  struct Source {
    Conversion conversion = Conversion::kCopy;
    // Null: every byte is the slot's initial byte.
    BufferPtr values;
    // The remainder of a weight, or the absmax of codes. Null: there is none, or it is zero.
    BufferPtr secondary;
    // The dtype of `secondary` if it is a remainder: I16 or I8.
    v1::DType remainder_dtype = v1::DTYPE_UNSPECIFIED;
    // Of these bytes.
    std::shared_ptr<ServedHashes> hashes;
  };
  // `request` is complete: it has a dtype, and a simplified box that meets the shard. `home` must
  // outlive the reader.
  ShardReader(const ShardInfo& shard, const SlotFormat& format, ReadRequest request, Source source,
              const SlotHome* home);

  uint64_t total_bytes() const { return part_.count() * element_bytes_; }
  v1::DType dtype() const { return request_.dtype; }
  bool done() const { return offset_bytes_ == total_bytes(); }
  // Returns the next chunk, in order.
  //   Status  InvalidArgument (fp16 cannot hold a value; the message names tensor and element),
  //           ResourceExhausted (there is no memory to build the chunk: try again when chunks that
  //           were sent have been released)
  absl::StatusOr<ReadChunk> Next();

 private:
  absl::StatusOr<BufferPtr> FreeBuffer();
  bool IsRawBlocks() const;
  std::vector<uint64_t> Hash(absl::Span<const uint8_t> chunk) const;
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
  const SlotHome* const home_;
  // The shard's part of the box's buffer, in elements of the answer.
  Range part_;
  uint64_t element_bytes_;
  // The box has the whole shard.
  bool is_whole_ = false;
  // If nothing has to be built: where the piece begins in source_.values.
  std::optional<uint64_t> direct_offset_bytes_;
  // Offset of the next chunk in the piece.
  uint64_t offset_bytes_ = 0;
  PieceDigest digest_;
  // Buffers in which chunks are built.
  std::vector<BufferPtr> built_;
};

// A caller that keeps at most so many built chunks needs no more than RoomToRead says.
inline constexpr int kBuiltChunks = 2;

// Implements ShardStore::RoomToRead.
uint64_t RoomToRead(const Shard& shard, const ReadRequest& wanted);

// Implements ShardStore::OpenRead.
absl::StatusOr<std::unique_ptr<ShardReader>> OpenShardRead(const Shard& shard,
                                                           const ReadRequest& wanted);

}  // namespace orlop::server
