// Writes one piece of a stream into memory of the server. While the bytes are in the cache, one
// pass checks their order and checksums and computes digest and norm.
//
// Example
//   writer->WriteChunk(...) ... ; writer->Finish(digest); writer->Keep(); writer->Settle();
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/checksum.h"
#include "kernels/reduce.h"
#include "server/memory/accountant.h"

namespace orlop::server {

// What is known of a finished piece.
struct PieceResult {
  // The digest of the piece's bytes (base/checksum.h).
  Digest128 digest;
  // The norm, if Options::reduce is set; otherwise zero.
  kernels::BlockSums sums;
};

// The receiver of a piece's bytes, which it gets in ascending order. The base class discards them.
class PieceSink {
 public:
  virtual ~PieceSink() = default;
  // Returns memory for the whole piece if its bytes are stored as they arrive. Null: the writer
  // calls Write instead.
  virtual uint8_t* Destination() { return nullptr; }
  // Takes the bytes from `offset_bytes` of the piece on: Options::sink_bytes of them, and fewer
  // only at the end of the piece.
  virtual absl::Status Write(uint64_t offset_bytes, absl::Span<const uint8_t> bytes) {
    return absl::OkStatus();
  }
};

// A stream's claim to one piece of a stage: while it lives, no other stream may send the piece.
class PieceClaim {
 public:
  virtual ~PieceClaim() = default;
  // As PieceWriter::Keep and PieceWriter::Settle.
  virtual absl::Status Keep(const PieceResult& result) = 0;
  virtual void Settle() {}
};

// Writes one piece. Not thread-safe: one stream owns it. A piece whose writer is destroyed before
// Keep has succeeded does not count.
class PieceWriter {
 public:
  struct Options {
    // Size of the piece.
    uint64_t total_bytes = 0;
    // The dtype of the elements. Only `reduce` uses it.
    kernels::DType dtype = kernels::DType::kF32;
    // Take the norm: for a gradient of a whole shard, whose elements are one range.
    bool reduce = false;
    // Names the piece in messages: "tensor 'layer.weight', shard 3".
    std::string name;
    // The bytes that a sink without a destination takes at once. 64 KiB are whole 256-blocks of any
    // float.
    uint64_t sink_bytes = 64 << 10;
  };
  // If `claim` is null, the piece was stored before: its bytes are only hashed.
  PieceWriter(Options options, std::unique_ptr<PieceSink> sink, std::unique_ptr<PieceClaim> claim);

  uint64_t total_bytes() const { return options_.total_bytes; }
  uint64_t written_bytes() const { return written_bytes_; }

  // Writes one chunk, given as the slices that the network delivered. A chunk has at most 4 MiB,
  // and whole leaves of 1 MiB unless it ends the piece. `checksum` is ChunkChecksum of its leaves
  // (base/checksum.h). After an error the piece must be begun again.
  //   Status  InvalidArgument (`offset_bytes` is not the next offset, or the size is wrong),
  //           Aborted (CHECKSUM), FailedPrecondition (an earlier call failed), or as
  //           PieceSink::Write
  absl::Status WriteChunk(uint64_t offset_bytes, absl::Span<const absl::Span<const uint8_t>> slices,
                          uint64_t checksum);

  // Checks that all bytes have arrived and that their digest is `digest`, which the sender gave.
  //   Status  InvalidArgument (bytes are missing), Aborted (CHECKSUM: the digest differs),
  //           FailedPrecondition (an earlier call failed)
  absl::StatusOr<PieceResult> Finish(const Digest128& digest);

  // Makes the piece count. Call it after Finish, if the step machine accepts the piece. A piece
  // that was stored before stays as it was. Waits neither for the disk nor for another shard, so
  // that it may be called under the lock of a job.
  //   Status  Aborted (the stage has been dropped meanwhile), AlreadyExists (a SetState piece was
  //           stored before with other bytes), FailedPrecondition (Finish has not succeeded)
  absl::Status Keep();

  // Releases the buffers of a piece that was kept. If it is a SetState piece of a whole shard, also
  // moves its planes to disk where their slots are there. Waits for the disk, so call it outside of
  // any lock. A piece counts without it, but a LOAD larger than memory needs it. It has no effect
  // on a piece that was not kept.
  void Settle();

 private:
  void CopyToDestination(absl::Span<const uint8_t> slice);
  absl::Status PassToSink(absl::Span<const uint8_t> slice);

  const Options options_;
  std::unique_ptr<PieceSink> sink_;
  std::unique_ptr<PieceClaim> claim_;
  uint8_t* destination_;
  // Without a destination: the bytes [consumed_bytes_, written_bytes_) of the piece.
  std::vector<uint8_t> block_;
  // Bytes that have arrived.
  uint64_t written_bytes_ = 0;
  // Bytes of them that were passed to the sink or, with a destination, make whole strips.
  uint64_t consumed_bytes_ = 0;
  ChunkHasher hasher_;
  PieceDigest digest_;
  PieceResult result_;
  enum class State : uint8_t { kWriting, kFinished, kKept, kFailed } state_ = State::kWriting;
};

}  // namespace orlop::server
