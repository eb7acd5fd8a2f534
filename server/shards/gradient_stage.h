// What is staged of one shard's gradient in one attempt: the pieces that the contribution layout
// expects, and their sum. Streams keep it alive, so that dropping it leaves them harmless.
//   Threads  all methods are safe from any thread. Begin and Sum of one stage wait for one another
//            and may wait for the disk, if memory is short; all else waits for neither.
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

// The gradient that a step reads.
struct StagedGradient {
  BufferPtr owner;  // keeps `values`; null: they are constants
  // No contributor sent this shard a gradient. If other shards of the tensor have one, the gradient
  // is zero.
  bool absent = true;
  kernels::TypedSpan values;  // one for each element of the shard
};
// Zeros for every element of a shard.
StagedGradient AbsentGradient(const ShardInfo& shard);

// All that a stage holds, as it is written to disk and comes back.
struct GradientImage {
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;  // of `whole`
  BufferPtr whole;                          // all elements of the shard, or null
  std::optional<StagedShard> result;
  std::vector<GradientPiece> pieces;  // by rank, then region; not claimed
};

class GradientStage : public std::enable_shared_from_this<GradientStage> {
 public:
  // `expected`: the shard's pieces, by rank, then region. `room` outlives the calls of Begin and
  // Sum.
  GradientStage(const ShardInfo& shard, const std::vector<ExpectedPiece>& expected,
                StagingRoom* room);

  // See ShardStore::BeginGradient.
  absl::StatusOr<std::unique_ptr<PieceWriter>> Begin(uint32_t rank, int32_t region,
                                                     v1::DType dtype);
  // Sums what was kept in ascending rank, hashes it and takes its norm. Again: the same result.
  //   Status  Aborted (dropped), ResourceExhausted
  absl::StatusOr<StagedShard> Sum();
  // The sum. FailedPrecondition: pieces were kept and not summed.
  absl::StatusOr<StagedGradient> Gradient() const;
  // Refuses what streams still send.
  void Drop();

  bool has_begun() const;           // some piece is being sent or was kept
  std::string Description() const;  // "staged", "staging 2 of 3 pieces"

  GradientImage Image() const;
  // Replaces what is staged. The pieces of `image` may lack their boxes.
  //   Status  FailedPrecondition (other pieces than those expected)
  absl::Status Install(GradientImage image);

 private:
  class Claim;
  // A piece that a stream may send.
  struct Begun {
    size_t index = 0;
    Box box;
    Range part;
    bool repeated = false;  // it was stored before
  };

  absl::StatusOr<Begun> ClaimPiece(uint32_t rank, int32_t region, v1::DType dtype);
  absl::StatusOr<BufferPtr> Whole(v1::DType dtype) REQUIRES(work_mutex_);
  absl::StatusOr<StagedShard> SumSeveral(std::vector<GradientPiece> pieces) REQUIRES(work_mutex_);
  bool HasPieces() const REQUIRES(mutex_);

  const ShardInfo shard_;
  StagingRoom* const room_;
  bool direct_;       // every element comes from one contributor: pieces are kept in `whole_`
  Mutex work_mutex_;  // held while memory is found or the sum is made; taken before mutex_
  mutable Mutex mutex_;
  std::vector<GradientPiece> pieces_ GUARDED_BY(mutex_);  // by rank, then region
  bool dropped_ GUARDED_BY(mutex_) = false;
  v1::DType dtype_ GUARDED_BY(mutex_) = v1::DTYPE_UNSPECIFIED;  // of `whole_`
  BufferPtr whole_ GUARDED_BY(mutex_);
  std::optional<StagedShard> result_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
