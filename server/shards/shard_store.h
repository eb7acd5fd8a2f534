// The state of one job on one server: its shards' slots in memory or on disk, what is staged, the
// apply, and reads. This is the face; the work is done by the classes of this folder and of
// server/tiers.
//
// The step machine (server/step) decides what counts; this class holds the bytes and does as it is
// told. A shard is named by its id: its place in manifest order among all shards of the job
// (step::ShardId).
//
// Life       Create -> Configure -> (SetLayout, pieces, stagers, Apply)*; Configure may be repeated
//            until slots were stepped.
// Promises   Create reserves weights, Configure optimizer slots and the room of one apply,
//            SetLayout staging. Nothing fails for lack of room after that, but a push in another
//            dtype than the manifest's, or a SetState.
// Threads    All methods are safe from any thread. Pieces of one shard may be written by several
//            streams at once; different shards apply at once. Reads never wait for an apply, and an
//            apply never waits for a reader: it writes a fresh buffer where a reader still keeps
//            the old one. Configure and SetLayout of one job wait for one another.
// Disk       Each call below says if it may wait for the disk. Those that say nothing do not, and
//            may be called under the lock of a job.
// Locks      In this order: Configure and SetLayout; one shard; one stage; Tiers; the slots of one
//            shard; the accountant. Three of them are held while the disk is waited for: the first,
//            that of Tiers, and the one under which a gradient stage finds memory (work_mutex_).
//            None of the calls that do not wait takes one of those.
// Messages   name tensor, shard, value and limit; details are v1::ErrorDetail (proto/status.h).
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
#include "server/shards/shard_read.h"
#include "server/shards/shard_update.h"
#include "server/shards/staged.h"
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
  int64_t version = -1;
  std::vector<SlotStatus> slots;
  std::string stage;  // "idle", "staging 2 of 3 pieces", "staged", "applying"
};

class ShardStore {
 public:
  // Reserves room for the weights (remainders too). `tiers` must outlive the store. May wait for
  // the disk.
  //   Status  ResourceExhausted (BUDGET: `limit` is the smallest memory budget that would do)
  static absl::StatusOr<std::unique_ptr<ShardStore>> Create(OwnedShards owned, Tiers* tiers);
  ~ShardStore();

  const OwnedShards& layout() const { return owned_; }

  // Reserves optimizer slots and the room of an apply; slots begin as zero. One entry for each
  // tensor. The same again: no effect. Another one replaces the slots whose format it changes. May
  // wait for the disk.
  //   Beside  reads, Describe, gradient pieces and their stagers, DropStaged, and applies that step
  //           nothing (SKIP, an untouched tensor). BeginLoad answers Unavailable meanwhile, and an
  //           Apply that would step slots FailedPrecondition: a job is configured before its first
  //           step.
  //   Status  InvalidArgument (a buffer with an optimizer), FailedPrecondition (pieces are staged),
  //           ResourceExhausted (as Create; the old configuration stays, with its contents)
  absl::Status Configure(const std::vector<TensorOptimizer>& optimizers);
  bool IsConfiguredAs(const std::vector<TensorOptimizer>& optimizers) const;
  TensorOptimizer optimizer(uint32_t tensor) const;

  // ---- Staging ----
  // Replaces the contribution layout: drops what is staged and reserves room for the pieces of
  // every shard. A shard without pieces gets no gradient. May wait for the disk.
  //   Beside  everything but the applies of a decision whose gradients are staged: what they have
  //           not read yet would be dropped. A piece of the layout before is refused:
  //           InvalidArgument when it is begun, Aborted when it is kept.
  //   Status  InvalidArgument (unknown shard, bad box, key twice: the layout before stays),
  //           ResourceExhausted (nothing is expected then)
  absl::Status SetLayout(const std::vector<ExpectedPiece>& pieces);

  // Begins a gradient piece. `dtype` F32, BF16, F16 or int8 with block scales; all pieces of a
  // shard whose elements come from exactly one contributor each share it. A piece that is already
  // stored is only hashed: Finish returns its digest, Keep changes nothing. May wait for the disk
  // if memory is short.
  //   Status  InvalidArgument (not expected, wrong dtype), NotFound (shard), AlreadyExists (stored
  //           in another dtype), Unavailable (another stream is sending it), ResourceExhausted
  //           (BUDGET: no memory for it, or no room on the disk for the apply)
  absl::StatusOr<std::unique_ptr<PieceWriter>> BeginGradient(int32_t shard, uint32_t rank,
                                                             int32_t region, v1::DType dtype);

  // Begins a SetState piece of any slot. fp32 contents of a quantised slot must cover whole
  // 256-blocks or end with the tensor; "<slot>_absmax" is set by flat boxes of whole blocks, one
  // fp32 for each block. A weight may be F32, F16 (with the exact master kept) or BF16 (remainder
  // zero unless set too). May wait for the disk if memory is short.
  //   Status  InvalidArgument (box, slot or dtype), NotFound, AlreadyExists (overlaps another
  //           piece), Unavailable (another stream is sending it, or the shard is being applied or
  //           configured), ResourceExhausted
  absl::StatusOr<std::unique_ptr<PieceWriter>> BeginLoad(int32_t shard, Slot slot, v1::DType dtype,
                                                         const Box& box);

  // Slot and box of every SetState piece that was kept for a shard. NotFound: the shard.
  absl::StatusOr<std::vector<std::pair<Slot, Box>>> StagedLoads(int32_t shard) const;

  // A task to run when all that will come has come: it sums contributions in ascending rank, hashes
  // them and takes the norm; of a LOAD, it fills what pieces did not cover from the present values.
  // Bound to what is staged now, to be run later from any thread: what another attempt stages is
  // never taken for it. The task may wait for the disk.
  //   Status  Aborted (dropped before it ran), FailedPrecondition (LOADING: the first LOAD leaves
  //           part of this weight unset, by name), DataLoss, ResourceExhausted
  using Stager = std::function<absl::StatusOr<StagedShard>()>;
  Stager StagerOf(int32_t shard, bool is_load);
  void DropStaged();

  // ---- Apply ----
  // Makes version update.step of a shard, as one unit, and frees what was staged. The version must
  // be step - 1; for a LOAD, any. If the optimizer takes a pass over the whole tensor first
  // (kernels::Scope), update.pass is what RunPass found. Waits for the disk if slots are there.
  //   Status  DataLoss (a spilled slot is damaged: the shard keeps its version), FailedPrecondition
  //           (wrong version, not staged, being configured), ResourceExhausted (a failing disk took
  //           back nothing of earlier applies: nothing has changed, try again), Aborted (a flush
  //           was loaded since update.loads)
  absl::Status Apply(int32_t shard, const ShardUpdate& update);
  // How many times BeginRestore was called.
  int64_t loads() const { return loads_; }
  // The pass over a tensor all of whose shards are here, at one version, staged and not being
  // applied. Changes nothing, so that it may be done again. One matrix at a time: its memory comes
  // back when the last update that has the result is gone. Waits for the disk if slots are there.
  //   Status  as Apply; ResourceExhausted: no memory for it now
  absl::StatusOr<std::shared_ptr<const PassResult>> RunPass(uint32_t tensor,
                                                            const ShardUpdate& update);
  // Shards in order of next use; see UseOrder.
  std::vector<int32_t> NextUseOrder() const { return residency_->NextUse(); }

  // ---- Reading ----
  // Opens a read of one slot at an exact version; see ShardReader. Waits for the disk if the slot
  // is there.
  //   Status  InvalidArgument (box, slot, dtype), NotFound (shard), OutOfRange (VERSION_GONE),
  //           FailedPrecondition (LOADING; not made yet), DataLoss, ResourceExhausted
  absl::StatusOr<std::unique_ptr<ShardReader>> OpenRead(const ReadRequest& request);

  // ---- What can be seen ----
  absl::StatusOr<int64_t> version(int32_t shard) const;  // -1: LOADING
  absl::StatusOr<ShardStatus> Describe(int32_t shard) const;

  // ---- All bytes ----
  // The door to a shard's bytes (server/shards/shard_image.h). Waits until nobody works on its
  // slots. NotFound: the shard.
  absl::StatusOr<std::unique_ptr<ShardImage>> Image(int32_t shard);
  // Before images replace the state of the job: drops what is staged, and aborts applies that were
  // made before (ShardUpdate::loads).
  void BeginRestore();

 private:
  ShardStore(OwnedShards owned, Tiers* tiers);
  absl::StatusOr<Shard*> Find(int32_t id) const;
  absl::Status ChangeSlots(const std::vector<TensorOptimizer>& before,
                           const std::vector<TensorOptimizer>& after);
  absl::StatusOr<TensorOptimizer> SettledOptimizer(const Shard& shard) const;
  absl::Status Step(Shard* shard, const SlotHold& hold, const ShardUpdate& update);
  absl::StatusOr<std::unique_ptr<PieceWriter>> TryBeginLoad(Shard* shard, Slot slot,
                                                            v1::DType dtype, const Box& box);

  const OwnedShards owned_;
  const std::vector<std::unique_ptr<Shard>> shards_;  // as owned_.shards
  const std::unique_ptr<Residency> residency_;
  StagingRoom staging_;
  JobRoom pass_room_;
  std::atomic<int64_t> loads_ = 0;  // of flushes begun
  Mutex setup_mutex_;               // one Configure or SetLayout at a time
  mutable Mutex mutex_;             // taken under a shard's lock
  std::vector<TensorOptimizer> optimizers_ GUARDED_BY(mutex_);  // by tensor
  enum class Configuration : uint8_t { kNone, kChanging, kSet };
  Configuration configuration_ GUARDED_BY(mutex_) = Configuration::kNone;
};

}  // namespace orlop::server
