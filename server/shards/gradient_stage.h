// What is staged of one shard's gradient in one attempt: the pieces that the contribution layout
// expects, and their sum. A piece is kept once PieceWriter::Keep has succeeded. A stream that
// writes a piece shares ownership of the stage. After Drop it can still write, but its piece is
// refused.
//   Threads  all methods are safe from any thread. Begin and Sum of one stage exclude each other
//            and may wait for the disk if memory is short. The other methods wait for neither.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "kernels/types.h"
#include "server/job/contributions.h"
#include "server/memory/accountant.h"
#include "server/shards/gradient_sum.h"
#include "server/shards/piece_writer.h"
#include "server/shards/shard_info.h"
#include "server/shards/staged.h"
#include "server/shards/staging_room.h"

namespace orlop::server {

// The gradient of one shard as a step reads it.
struct StagedGradient {
  // Keeps `values` alive. Null if they are constants.
  BufferPtr owner;
  // No contributor sent this shard a gradient. If other shards of the tensor have one, the gradient
  // is zero.
  bool absent = true;
  // One value for each element of the shard.
  kernels::TypedSpan values;
};
// Returns a zero for every element of a shard. The zeros take no memory.
StagedGradient AbsentGradient(const ShardInfo& shard);

// All that a stage holds, for whoever writes it to disk or copies it (ShardImage).
struct GradientImage {
  // The dtype of `whole`.
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  // All elements of the shard: direct pieces, or the sum of others. Null if there is neither.
  BufferPtr whole;
  // What Sum returned; absent if it has not succeeded.
  std::optional<StagedShard> result;
  // The expected pieces by rank, then region. None is claimed.
  std::vector<GradientPiece> pieces;
};

class GradientStage : public std::enable_shared_from_this<GradientStage> {
 public:
  // `expected` has the shard's pieces, by rank, then region. `room` must outlive every call of
  // Begin and Sum.
  GradientStage(const ShardInfo& shard, const std::vector<ExpectedPiece>& expected,
                StagingRoom* room);

  // Implements ShardStore::BeginGradient.
  absl::StatusOr<std::unique_ptr<PieceWriter>> Begin(uint32_t rank, int32_t region,
                                                     v1::DType dtype);
  // Adds, in ascending rank, the pieces that were kept, hashes the sum and takes its norm. A
  // repeated call returns the same result.
  //   Status  Aborted (Drop was called), ResourceExhausted (there is no memory for the sum)
  absl::StatusOr<StagedShard> Sum();
  // Returns the sum, or zeros if no piece was kept.
  //   Status  FailedPrecondition (pieces were kept, and Sum has not succeeded)
  absl::StatusOr<StagedGradient> Gradient() const;
  // Ends the attempt. PieceWriter::Keep and Sum return Aborted from then on.
  void Drop();

  bool has_begun() const;           // some piece is being sent or was kept
  std::string Description() const;  // "staged", "staging 2 of 3 pieces"

  // Returns what is staged. The buffers are shared, not copied.
  GradientImage Image() const;
  // Replaces what is staged by `image`, whose pieces may lack their boxes.
  //   Status  FailedPrecondition (the pieces are not those expected)
  absl::Status Install(GradientImage image);

 private:
  class Claim;
  // A piece that a stream may send.
  struct Begun {
    // Index in pieces_.
    size_t index = 0;
    Box box;
    // The shard's part of the box's buffer, in elements.
    Range part;
    // The piece was stored before.
    bool repeated = false;
  };

  absl::StatusOr<Begun> ClaimPiece(uint32_t rank, int32_t region, v1::DType dtype);
  absl::StatusOr<BufferPtr> Whole(v1::DType dtype, Fill fill) REQUIRES(work_mutex_);
  absl::StatusOr<StagedShard> SumSeveral(const std::vector<GradientPiece>& pieces)
      REQUIRES(work_mutex_);
  absl::Status CheckBytes(const GradientImage& image) const;
  bool HasPieces() const REQUIRES(mutex_);

  const ShardInfo shard_;
  StagingRoom* const room_;
  // Every element comes from one contributor, so that pieces are written to their places in whole_.
  bool direct_;
  // Held while memory is found or the sum is made. Taken before mutex_.
  Mutex work_mutex_;
  mutable Mutex mutex_;
  std::vector<GradientPiece> pieces_ GUARDED_BY(mutex_);  // by rank, then region
  bool dropped_ GUARDED_BY(mutex_) = false;
  v1::DType dtype_ GUARDED_BY(mutex_) = v1::DTYPE_UNSPECIFIED;  // of whole_
  BufferPtr whole_ GUARDED_BY(mutex_);
  std::optional<StagedShard> result_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
