// What is staged of one shard in one attempt of a LOAD. SetState sends pieces, which are boxes of
// any slots of the shard. The stage writes them into planes: a plane is the whole new contents of
// one stored slot, in the format in which the slot is stored. Fill copies what no kept piece has
// set from the present slots (load_cover.h has the exception), and drops the planes that only
// refused pieces have written to. The apply of the LOAD then takes the planes.
//
// The bytes of a plane are in memory, or on disk once PieceWriter::Settle has moved them. All
// methods treat both alike.
//   Threads  all methods are safe from any thread. The lock of this class is never held while the
//            disk is read or written.
//   Life     a shared_ptr owns the stage, and the writers that Begin returns share it. They may go
//            on after Drop; what they write is then refused.
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

// One piece of a stage.
struct LoadPiece {
  Slot slot = Slot::kWeight;
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;  // of the bytes as they are sent
  Box box;                                  // Simplified (base/box.h)
  bool claimed = false;                     // a stream is sending it
  bool stored = false;                      // it was kept (PieceWriter::Keep)
  Digest128 digest;                         // of the bytes as they were sent, if stored
};

// The new contents of one stored slot, in its final format. All empty: the slot has no plane.
struct LoadPlane {
  SlotBytes bytes;  // `data`, or `spilled` if it is on disk; neither: the LOAD has no such plane
  // The memory of `data`. Empty if `data` is in the slot's own room or in the StagingRoom's.
  Reservation room;
  Digest128 digest;     // of the bytes on disk, if `spilled` is set
  bool moving = false;  // Settle is writing `data` to disk
};

// All of a stage but its planes, for a flush.
struct LoadImage {
  std::optional<StagedShard> result;  // of Fill; absent: Fill has not succeeded
  std::vector<LoadPiece> pieces;
};

class LoadStage : public std::enable_shared_from_this<LoadStage> {
 public:
  // `slots` and `room` are not owned. They must outlive every call, except what writers do after
  // Drop.
  LoadStage(const ShardInfo& shard, SlotHome* slots, StagingRoom* room);

  // Begins a piece and returns the writer for its bytes. `plan` is PlanLoad's result for the slots'
  // present formats; `rounding` is for states that must be encoded. If the same piece was kept
  // before, the writer only compares the bytes. Does not wait.
  //   Status  AlreadyExists: it overlaps another piece; Unavailable: another stream is sending it,
  //           or the shard is being applied; ResourceExhausted: no memory for a plane
  absl::StatusOr<std::unique_ptr<PieceWriter>> Begin(const LoadPlan& plan,
                                                     kernels::Rounding rounding);
  // Completes the planes with the present contents of the slots, on which `hold` is, and hashes
  // them. Refuses pieces while it runs and after it has succeeded. Waits for the disk. A later call
  // returns the same result.
  //   Status  Aborted: dropped; FailedPrecondition (LOADING): the first LOAD leaves part of the
  //           weight unset; ResourceExhausted: no memory; DataLoss: a spilled slot is damaged
  absl::StatusOr<StagedShard> Fill(const SlotHold& hold);
  // Moves the planes out of the stage, by SlotIndex. Waits for a Settle that is writing to disk.
  //   Status  FailedPrecondition: Fill has not succeeded
  absl::StatusOr<std::array<LoadPlane, kStoredSlotCount>> TakePlanes();
  // Ends the stage: writers are refused from now on. Planes on disk are erased later
  // (Tiers::Discard); this call does not wait for the disk.
  void Drop();

  // Whether a piece is being sent or was kept.
  bool has_begun() const;
  // Whether a piece was kept. A LOAD sets what was kept, and nothing of a piece that was refused.
  bool has_kept() const;
  // Slot and box of every piece that was kept.
  std::vector<std::pair<Slot, Box>> Stored() const;
  // For people: "staged", or "staging 2 pieces of state".
  std::string Description() const;

  // Returns a copy of the pieces and the result.
  LoadImage Image() const;
  // Returns the contents of a plane; null if there is no such plane. Reads the disk.
  //   Status  ResourceExhausted: no memory for a copy; DataLoss: the bytes on disk are damaged
  absl::StatusOr<BufferPtr> ReadPlane(Slot slot) const;
  // Gives a new, empty stage the contents that a flush has kept. `planes`: by SlotIndex; null: the
  // LOAD has no such plane.
  //   Status  FailedPrecondition: a piece or a plane does not fit the shard's slots
  absl::Status Install(LoadImage image, std::array<BufferPtr, kStoredSlotCount> planes);

 private:
  class Claim;  // the PieceClaim of a writer
  class Sink;   // its PieceSink

  absl::StatusOr<size_t> FindPlace(const SlotFormats& formats, const LoadPlan& plan)
      REQUIRES(mutex_);
  absl::Status MakePlane(const SlotFormats& formats, Slot slot) REQUIRES(mutex_);
  absl::Status Keep(size_t piece, const PieceResult& result);  // `piece`: index in pieces_
  void Settle(Slot slot);
  absl::StatusOr<StagedShard> FillPlanes(const SlotHold& hold,
                                         const std::vector<LoadPiece>& pieces);
  absl::Status FillPlane(const SlotHold& hold, const std::vector<LoadPiece>& pieces, Slot slot,
                         std::vector<uint64_t>* identity);
  absl::StatusOr<BufferPtr> PlaneToFill(Slot slot, uint64_t bytes);
  void Discard(Slot slot) REQUIRES(mutex_);
  LoadPlane& plane(Slot slot) REQUIRES(mutex_) { return planes_[SlotIndex(slot)]; }
  PieceWriter::Options OptionsOf(const LoadPlan& plan) const;

  const ShardInfo shard_;
  SlotHome* const slots_;
  StagingRoom* const room_;
  mutable Mutex mutex_;
  CondVar moved_;  // a plane's `moving` has become false
  std::vector<LoadPiece> pieces_ GUARDED_BY(mutex_);
  std::array<LoadPlane, kStoredSlotCount> planes_ GUARDED_BY(mutex_);
  // Fill is running.
  bool filling_ GUARDED_BY(mutex_) = false;
  bool dropped_ GUARDED_BY(mutex_) = false;
  std::optional<StagedShard> result_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
