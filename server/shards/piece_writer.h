// One piece of a stream on its way into server-owned memory: order, checksums, digest and norm in
// one pass while it is in cache.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
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

// Where the bytes of a piece go, in ascending order.
class PieceSink {
 public:
  virtual ~PieceSink() = default;
  // Where the bytes of the piece from `offset` on belong, if they are kept as they come; null:
  // Write is called.
  virtual uint8_t* Destination() { return nullptr; }
  // Takes whole Options::sink_bytes, but at the end of the piece.
  virtual absl::Status Write(uint64_t offset_bytes, absl::Span<const uint8_t> bytes) {
    return absl::OkStatus();
  }
};

// Writes one piece. Not thread-safe: one stream owns it. Destroyed unfinished or not kept: nothing
// of it counts.
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
  // `keep` registers the piece with its shard; called by Keep, at most once.
  PieceWriter(Options options, std::unique_ptr<PieceSink> sink,
              std::function<absl::Status(const PieceResult&)> keep, std::function<void()> release);
  ~PieceWriter();

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
  // before stays as it was. Aborted if what was staged has been dropped meanwhile.
  absl::Status Keep();

 private:
  void CopyToDestination(absl::Span<const uint8_t> slice);
  absl::Status PassToSink(absl::Span<const uint8_t> slice);

  const Options options_;
  std::unique_ptr<PieceSink> sink_;
  std::function<absl::Status(const PieceResult&)> keep_;
  std::function<void()> release_;
  uint8_t* destination_;
  std::vector<uint8_t> block_;  // what has not yet reached the sink, where there is no destination
  uint64_t written_bytes_ = 0;
  uint64_t consumed_bytes_ = 0;
  ChunkHasher hasher_;
  PieceDigest digest_;
  PieceResult result_;
  enum class State : uint8_t { kWriting, kFinished, kKept, kFailed } state_ = State::kWriting;
};

}  // namespace orlop::server
