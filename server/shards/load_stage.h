// What is staged of one shard by SetState in one attempt (a LOAD): pieces of any slot become new
// planes, the whole contents of stored slots in their final format. What pieces leave out keeps its
// bits. Streams keep the stage alive, so that dropping it leaves them harmless.
//
// A plane is in memory, or (moved by Settle) on disk; it counts in either state.
//   Threads  all methods are safe from any thread. The lock of this class is never held while the
//            disk is read or written.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "kernels/quantize.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/load_converter.h"
#include "server/shards/load_plan.h"
#include "server/shards/piece_writer.h"
#include "server/shards/shard_info.h"
#include "server/shards/staged.h"
#include "server/shards/staging_room.h"
#include "server/tiers/slot_home.h"

namespace orlop::server {

struct LoadPiece {
  Slot slot = Slot::kWeight;
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  Box box;  // simplified
  bool claimed = false;
  bool stored = false;
  Digest128 digest;
};

// New contents of one stored slot, in its final format.
struct LoadPlane {
  SlotBytes bytes;      // `data`, or `spilled` if whole contents are on disk
  Reservation room;     // of `data`; empty if that is in the slot's own room
  Digest128 digest;     // of contents on disk
  bool moving = false;  // Settle is writing `data` to disk
};

// All that a stage holds but the planes, as it is written to disk and comes back.
struct LoadImage {
  std::optional<StagedShard> result;
  std::vector<LoadPiece> pieces;
};

class LoadStage : public std::enable_shared_from_this<LoadStage> {
 public:
  // `slots` and `room` outlive all calls but those of streams after Drop.
  LoadStage(const ShardInfo& shard, SlotHome* slots, StagingRoom* room);

  // Begins the piece of `plan`, which was checked against the present formats. Does not wait.
  //   Status  AlreadyExists (it overlaps another piece), Unavailable (another stream is sending it,
  //           or the slots are held), ResourceExhausted
  absl::StatusOr<std::unique_ptr<PieceWriter>> Begin(const LoadPlan& plan,
                                                     kernels::Rounding rounding);
  // Fills what pieces did not cover from the present slots, and hashes the planes. Pieces are
  // refused from then on. Waits for the disk. Again: the same result.
  //   Status  Aborted (dropped), FailedPrecondition (LOADING: the first LOAD leaves part of the
  //           weight unset), ResourceExhausted, DataLoss
  absl::StatusOr<StagedShard> Fill(const SlotHold& hold);
  // Gives the filled planes away, by SlotIndex. Waits until Settle has moved the last one.
  //   Status  FailedPrecondition (not filled)
  absl::StatusOr<std::array<LoadPlane, kStoredSlotCount>> TakePlanes();
  // Refuses what streams still send, and discards planes on disk without waiting for it.
  void Drop();

  bool has_begun() const;                            // some piece is being sent or was kept
  std::vector<std::pair<Slot, Box>> Stored() const;  // of the pieces that were kept
  std::string Description() const;                   // "staged", "staging 2 pieces of state"

  LoadImage Image() const;
  // The contents of a plane; null if there are none. Reads the disk.
  absl::StatusOr<BufferPtr> ReadPlane(Slot slot) const;
  // Fills a new stage. `planes`: by SlotIndex; null: none.
  void Install(LoadImage image, std::array<BufferPtr, kStoredSlotCount> planes);

 private:
  class Claim;
  class Sink;

  absl::StatusOr<size_t> FindPlace(const SlotFormats& formats, const LoadPlan& plan)
      REQUIRES(mutex_);
  absl::Status MakePlane(const SlotFormats& formats, Slot slot) REQUIRES(mutex_);
  absl::Status Keep(size_t piece, const PieceResult& result);
  void Settle(Slot slot);
  absl::StatusOr<StagedShard> FillPlanes(const SlotHold& hold,
                                         const std::vector<LoadPiece>& pieces);
  absl::Status FillPlane(const SlotHold& hold, const std::vector<LoadPiece>& pieces, Slot slot,
                         std::vector<uint64_t>* identity);
  absl::StatusOr<BufferPtr> PlaneToFill(Slot slot, uint64_t bytes);
  LoadPlane& plane(Slot slot) REQUIRES(mutex_) { return planes_[SlotIndex(slot)]; }
  PieceWriter::Options OptionsOf(const LoadPlan& plan) const;

  const ShardInfo shard_;
  SlotHome* const slots_;
  StagingRoom* const room_;
  mutable Mutex mutex_;
  CondVar moved_;
  std::vector<LoadPiece> pieces_ GUARDED_BY(mutex_);
  std::array<LoadPlane, kStoredSlotCount> planes_ GUARDED_BY(mutex_);
  bool filling_ GUARDED_BY(mutex_) = false;
  bool dropped_ GUARDED_BY(mutex_) = false;
  std::optional<StagedShard> result_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
