// The state of one job on one server: the slots of its shards, what is staged for them, the apply,
// and reads. This class is the interface; the other classes of this folder and of server/tiers do
// the work.
//
// The step machine (server/step) decides which pieces and steps count; this class holds the bytes.
// A shard is named by its id: its place in manifest order among all shards of the job
// (step::ShardId).
//
// Life       Create -> Configure -> (SetLayout, pieces, stagers, Apply)*. Configure may be called
//            again until a step has changed slots.
// Memory     Create reserves room for weights, Configure for optimizer slots and one apply,
//            SetLayout for staging. After that only a push in a wider dtype than the manifest's and
//            a SetState can fail for lack of memory.
// Threads    All methods are safe from any thread. Pieces of one shard may be written by several
//            streams at once, and different shards may be applied at once. A read never waits for
//            an apply. An apply writes a fresh buffer where a reader keeps the old one, and waits
//            for the reader only if there is no memory for it. Configure and SetLayout of one job
//            exclude each other.
// Disk       A method that may wait for the disk says so below. All others may be called under the
//            lock of a job.
// Locks      In this order: setup_mutex_; the lock of one shard; of one stage; of Tiers; of the
//            slots of one shard; of the accountant. mutex_ is taken under the lock of a shard, and
//            no lock under it. Three locks are held while a call waits for the disk: setup_mutex_,
//            that of Tiers, and GradientStage::work_mutex_. Methods that do not wait for the disk
//            take none of these three.
// Errors     Messages name tensor, shard, value and limit; details are v1::ErrorDetail
//            (proto/status.h).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/job/contributions.h"
#include "server/job/slots.h"
#include "server/shards/piece_writer.h"
#include "server/shards/shard_read.h"    // IWYU pragma: export
#include "server/shards/shard_update.h"  // IWYU pragma: export
#include "server/shards/staged.h"        // IWYU pragma: export
#include "server/shards/staging_room.h"
#include "server/tiers/job_room.h"
#include "server/tiers/residency.h"
#include "server/tiers/tier.h"

namespace orlop::server {

class ShardImage;  // server/shards/shard_image.h
struct Shard;      // server/shards/shard.h

struct SlotStatus {
  Slot slot = Slot::kWeight;
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  Tier tier = Tier::kDram;
  uint64_t bytes = 0;
};
struct ShardStatus {
  OwnedShard shard;
  // -1: the job is LOADING.
  int64_t version = -1;
  std::vector<SlotStatus> slots;
  // "idle", "staging 2 of 3 pieces", "staging 2 pieces of state", "staged" or "applying".
  std::string stage;
};

class ShardStore {
 public:
  // Creates a store and reserves room for the weights and remainders. `tiers` must outlive the
  // store. May wait for the disk.
  //   Status  ResourceExhausted (BUDGET: `limit` is the smallest memory budget that would do)
  static absl::StatusOr<std::unique_ptr<ShardStore>> Create(OwnedShards owned, Tiers* tiers);
  ~ShardStore();

  const OwnedShards& layout() const { return owned_; }

  // Gives each tensor its optimizer: `optimizers` has one entry per tensor. Reserves room for the
  // optimizer slots, which begin as zero, and for an apply. The present configuration again has no
  // effect. Another configuration replaces the slots whose format it changes. May wait for the
  // disk.
  //   Concurrent  reads, Describe, gradient pieces and their stagers, DropStaged, and applies that
  //               change no slot (SKIP, an untouched tensor). Meanwhile BeginLoad returns
  //               Unavailable, and an Apply that would step slots FailedPrecondition: a job is
  //               configured before its first step.
  //   Status      InvalidArgument (a buffer with an optimizer), FailedPrecondition (pieces are
  //               staged), ResourceExhausted (as Create; the old configuration stays, with its
  //               contents)
  absl::Status Configure(const std::vector<TensorOptimizer>& optimizers);
  bool IsConfiguredAs(const std::vector<TensorOptimizer>& optimizers) const;
  // Returns the bytes that all slots take in a configuration, in memory; on disk they take at most
  // as many. A tensor that is unset takes none.
  uint64_t BytesAs(const std::vector<TensorOptimizer>& optimizers) const;
  TensorOptimizer optimizer(uint32_t tensor) const;

  // ---- Staging ----
  // Replaces the contribution layout: drops what is staged, and reserves room for the pieces of
  // every shard. A shard without pieces gets no gradient. May wait for the disk.
  //   Concurrent  everything except the applies of a decision whose gradients are staged: gradients
  //               that they have not read yet would be dropped. A piece of the layout before is
  //               refused, with InvalidArgument when it is begun, with Aborted when it is kept.
  //   Status      InvalidArgument (a box is not in the tensor or not in the shard, or a key is
  //               named twice) or NotFound (a shard is not here): the layout before stays.
  //               ResourceExhausted: no pieces are expected any more
  absl::Status SetLayout(const std::vector<ExpectedPiece>& pieces);

  // Begins a gradient piece. `dtype` is F32, BF16, F16 or int8 with block scales. If every element
  // of the shard comes from exactly one contributor, all its pieces have the same staged dtype. A
  // piece that is stored already is only hashed: Finish returns its digest, and Keep changes
  // nothing. May wait for the disk if memory is short.
  //   Status  InvalidArgument (the piece is not expected, or has a wrong dtype), NotFound (the
  //           shard is not here, or UNSET), AlreadyExists (the piece is stored in another dtype),
  //           Unavailable (another stream is sending it), ResourceExhausted (BUDGET: there is no
  //           memory for the piece, or no room on the disk for the apply)
  absl::StatusOr<std::unique_ptr<PieceWriter>> BeginGradient(int32_t shard, uint32_t rank,
                                                             int32_t region, v1::DType dtype);

  // Begins a SetState piece of any slot. fp32 contents of a quantised slot must cover whole
  // 256-blocks or end with the tensor. A slot "<state>_absmax" is set by flat boxes of whole
  // blocks, with one fp32 value for each block. A weight may be F32 or F16, which set the exact
  // master, or BF16, which makes the remainder zero unless another piece sets it. May wait for the
  // disk if memory is short. A tensor that is unset gets its room now.
  //   Status  InvalidArgument (box, slot or dtype), NotFound (the shard is not here), AlreadyExists
  //           (the piece overlaps another one), Unavailable (another stream is sending it, or the
  //           shard is being applied or configured), ResourceExhausted (no memory for the piece)
  absl::StatusOr<std::unique_ptr<PieceWriter>> BeginLoad(int32_t shard, Slot slot, v1::DType dtype,
                                                         const Box& box);

  // Returns slot and box of every SetState piece that was kept for a shard.
  //   Status  NotFound (the shard is not here)
  absl::StatusOr<std::vector<std::pair<Slot, Box>>> StagedLoads(int32_t shard) const;

  // Returns a task that completes the staging of a shard; run it when no more pieces will arrive.
  // For a gradient it adds the contributions in ascending rank, hashes the sum and takes the norm.
  // For a LOAD it fills the elements that no piece sets from the present values. The task is bound
  // to the present stage and never takes the pieces of another attempt. It may run on any thread,
  // and may wait for the disk.
  //   Status  of the task: Aborted (the stage was dropped before the task ran), FailedPrecondition
  //           (LOADING: the first LOAD leaves part of this weight unset; the message names it),
  //           DataLoss, ResourceExhausted, NotFound (the shard is not here)
  using Stager = std::function<absl::StatusOr<StagedShard>()>;
  Stager StagerOf(int32_t shard, bool is_load);
  void DropStaged();

  // ---- Apply ----
  // Makes version update.step of a shard as one unit, and drops what was staged. The shard must
  // have version update.step - 1; for a LOAD, any lower one. If the optimizer takes a pass over the
  // whole tensor first (kernels::Scope), update.pass must be the result of RunPass. Waits for the
  // disk if slots are there. After an error the shard keeps its version and its contents.
  //   Status  DataLoss (a slot on disk is damaged), FailedPrecondition (the version does not fit,
  //           nothing is staged, or the shard is being configured), ResourceExhausted (the window
  //           is full of slots that a failing disk has not taken back: try again), Aborted (a flush
  //           was loaded since update.loads), NotFound (the shard is not here)
  absl::Status Apply(int32_t shard, const ShardUpdate& update);
  // Returns how many times BeginRestore was called.
  int64_t loads() const { return loads_; }
  // Runs the pass over a tensor. All its shards must be here, at version update.step - 1, staged,
  // and not being applied. The pass changes nothing, so that it may be repeated. The memory of a
  // matrix (Muon) is free for the next pass when the last update with the result is destroyed.
  // Waits for the disk if slots are there.
  //   Status  as Apply; ResourceExhausted: another pass has the memory now
  absl::StatusOr<std::shared_ptr<const PassResult>> RunPass(uint32_t tensor,
                                                            const ShardUpdate& update);
  // Returns the ids of the shards in order of their next use (UseOrder).
  std::vector<int32_t> NextUseOrder() const { return residency_->NextUse(); }

  // ---- Reading ----
  // Returns the memory that a read takes beside the slots: what is read from disk, and two chunks
  // if they must be built. 0 if OpenRead would refuse it. Does not wait.
  uint64_t RoomToRead(const ReadRequest& request) const;
  // Opens a read of one slot at an exact version. Waits for the disk if the slot is there.
  //   Status  InvalidArgument (box, slot or dtype), NotFound (the shard is not here, or UNSET: no
  //           LOAD has set the tensor, Tensor::may_be_unset), OutOfRange
  //           (VERSION_GONE), FailedPrecondition (LOADING, or the version has not been made yet),
  //           DataLoss (the slot on disk is damaged), ResourceExhausted (no memory to bring it
  //           back)
  absl::StatusOr<std::unique_ptr<ShardReader>> OpenRead(const ReadRequest& request);

  // ---- What can be seen ----
  // Both return NotFound if the shard is not here. The version is -1 while the job is LOADING. A
  // shard that is unset has no slots.
  absl::StatusOr<int64_t> version(int32_t shard) const;
  absl::StatusOr<ShardStatus> Describe(int32_t shard) const;

  // ---- All bytes ----
  // Returns access to all bytes of a shard (server/shards/shard_image.h). Waits until nobody else
  // holds its slots.
  //   Status  NotFound (the shard is not here)
  absl::StatusOr<std::unique_ptr<ShardImage>> Image(int32_t shard);
  // Call this before images replace the state of the job. Drops what is staged. An Apply whose
  // update was made earlier returns Aborted (ShardUpdate::loads).
  void BeginRestore();

 private:
  ShardStore(OwnedShards owned, Tiers* tiers);
  absl::StatusOr<Shard*> Find(int32_t id) const;
  absl::Status ChangeSlots(const std::vector<TensorOptimizer>& before,
                           const std::vector<TensorOptimizer>& after);
  absl::StatusOr<TensorOptimizer> SettledOptimizer(const Shard& shard) const;
  absl::Status Step(Shard* shard, const SlotHold& hold, const ShardUpdate& update);
  absl::Status PlaceUnset(Shard* shard) EXCLUDES(setup_mutex_);
  absl::StatusOr<std::unique_ptr<PieceWriter>> TryBeginLoad(Shard* shard, Slot slot,
                                                            v1::DType dtype, const Box& box);

  const OwnedShards owned_;
  // In the order of owned_.shards.
  const std::vector<std::unique_ptr<Shard>> shards_;
  const std::unique_ptr<Residency> residency_;
  StagingRoom staging_;
  JobRoom pass_room_;
  std::atomic<int64_t> loads_ = 0;
  // Held by Configure and SetLayout, which exclude each other.
  Mutex setup_mutex_;
  mutable Mutex mutex_;
  // One entry per tensor.
  std::vector<TensorOptimizer> optimizers_ GUARDED_BY(mutex_);
  enum class Configuration : uint8_t { kNone, kChanging, kSet };
  Configuration configuration_ GUARDED_BY(mutex_) = Configuration::kNone;
};

}  // namespace orlop::server
