// One piece of a stream on its way into server-owned memory: order, checksums, digest and norm in
// one pass while it is in cache.
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

// What a finished piece is.
struct PieceResult {
  Digest128 digest;         // of its bytes (types.proto)
  kernels::BlockSums sums;  // of a gradient that was written as one range; else zero
};

// Where the bytes of a piece go, in ascending order. The base class takes them nowhere.
class PieceSink {
 public:
  virtual ~PieceSink() = default;
  // Memory for the whole piece, if its bytes are kept as they come; null: Write is called.
  virtual uint8_t* Destination() { return nullptr; }
  // Takes Options::sink_bytes at a time; fewer only at the end of the piece.
  virtual absl::Status Write(uint64_t offset_bytes, absl::Span<const uint8_t> bytes) {
    return absl::OkStatus();
  }
};

// The place that a stream has claimed for its piece in what is staged of a shard. Destroying it
// lets other streams send the piece.
class PieceClaim {
 public:
  virtual ~PieceClaim() = default;
  // See PieceWriter::Keep and Settle.
  virtual absl::Status Keep(const PieceResult& result) = 0;
  virtual void Settle() {}
};

// Writes one piece. Not thread-safe: one stream owns it. If it is destroyed unfinished or not kept,
// nothing of the piece counts.
class PieceWriter {
 public:
  struct Options {
    uint64_t total_bytes = 0;
    kernels::DType dtype = kernels::DType::kF32;
    bool reduce = false;  // take the norm (gradients written as one range)
    std::string name;     // "tensor layer.weight, shard 3", for messages
    // What a sink without destination takes at once: 64 KiB are whole 256-blocks of any float.
    uint64_t sink_bytes = 64 << 10;
  };
  // `claim` null: the piece was stored before, and its bytes are only compared.
  PieceWriter(Options options, std::unique_ptr<PieceSink> sink, std::unique_ptr<PieceClaim> claim);

  uint64_t total_bytes() const { return options_.total_bytes; }
  uint64_t written_bytes() const { return written_bytes_; }

  // Takes one chunk, given as the slices that the network delivered, at most 4 MiB in all.
  //   Status  InvalidArgument (offset not the next one, past the end, not whole leaves before the
  //   end), Aborted (CHECKSUM).
  //           After an error the piece is lost: begin again.
  absl::Status WriteChunk(uint64_t offset_bytes, absl::Span<const absl::Span<const uint8_t>> slices,
                          uint64_t checksum);

  // Checks that all bytes are here and are what the sender meant.
  //   Status  InvalidArgument (bytes missing), Aborted (CHECKSUM: digest differs).
  absl::StatusOr<PieceResult> Finish(const Digest128& digest);

  // Makes the piece count (after Finish, when the step machine said keep). A piece that was stored
  // before stays as it was. Waits neither for the disk nor for another shard: it may be called
  // under the lock of a job.
  //   Status  Aborted (what was staged has been dropped meanwhile), AlreadyExists (a SetState piece
  //           was stored before with other bytes)
  absl::Status Keep();

  // After Keep, and outside any lock: moves to disk what belongs there, which waits for the disk,
  // and gives back the memory of the piece. A piece counts without it, but a LOAD larger than
  // memory needs it. No effect on a piece that was not kept.
  void Settle();

 private:
  void CopyToDestination(absl::Span<const uint8_t> slice);
  absl::Status PassToSink(absl::Span<const uint8_t> slice);

  const Options options_;
  std::unique_ptr<PieceSink> sink_;
  std::unique_ptr<PieceClaim> claim_;
  uint8_t* destination_;
  std::vector<uint8_t> block_;  // if there is no destination: bytes that the sink has not yet
  uint64_t written_bytes_ = 0;
  uint64_t consumed_bytes_ = 0;
  ChunkHasher hasher_;
  PieceDigest digest_;
  PieceResult result_;
  enum class State : uint8_t { kWriting, kFinished, kKept, kFailed } state_ = State::kWriting;
};

}  // namespace orlop::server
