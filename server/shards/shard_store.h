// The state of one job on one server: its shards' slots in memory or spilled, what is staged, the
// apply, and reads.
//
// The step machine (server/step) decides what counts; this class holds the bytes and does as it is
// told. A shard is named by its id (place in manifest order among all shards of the job:
// step::ShardId).
//
// Life       Create -> Configure -> (SetLayout, pieces, Stage*, Apply)* ; Configure may be repeated
// until slots were stepped. Promises   weights are reserved by Create, optimizer slots and the room
// of one apply by Configure, staging by SetLayout.
//            Nothing fails for lack of room after that, but a push in another dtype than the
//            manifest's, or a SetState.
// Threads    all methods are safe from any thread. Pieces of one shard may be written by several
// streams at once; different shards
//            apply at once; reads never wait for an apply, and an apply never waits for a reader:
//            it writes a fresh buffer where a reader still holds the old one. Lock order: Tiers,
//            then one shard, then the accountant.
// Messages   name tensor, shard, value and limit; details are v1::ErrorDetail (proto/status.h).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/optimizer.h"
#include "kernels/tensor_pass.h"
#include "server/job/contributions.h"
#include "server/job/slots.h"
#include "server/shards/piece_writer.h"
#include "server/shards/shard_read.h"
#include "server/tiers/tier.h"

namespace orlop::server {

struct Shard;  // server/shards/shard.h
class WindowLease;
struct GradientStage;
struct LoadStage;
struct SlotState;

// What staging a shard found: step::ShardStaged without the step machine's words.
struct StagedShard {
  Digest128 digest;  // zero if absent
  double sum_squares = 0;
  uint64_t nonfinite_count = 0;
  bool absent = false;
};

// What the first phase of a step found in a whole tensor (kernels/tensor_pass.h), and the memory
// that its shards' updates read.
struct TensorLook {
  BufferPtr memory;  // kernels::PassMemory; or null
  std::optional<kernels::TensorPass> pass;
};

// What to do to a shard whose decision is committed.
struct ShardUpdate {
  enum class Kind : uint8_t { kApply, kSkip, kLoad };
  Kind kind = Kind::kApply;
  int64_t step = 0;        // the version it makes
  bool untouched = false;  // the tensor was absent from all contributors
  kernels::StepScalars scalars;
  kernels::RandomKey random;
  std::shared_ptr<const TensorLook> look;  // what Look found, of an optimizer that looks
  // ShardStore::loads() as the update was made: what a flush has replaced since is not stepped. -1:
  // whatever is there.
  int64_t loads = -1;
};

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

class ShardStore : public Spillable {
 public:
  // Reserves room for the weights (remainders too). `tiers` must outlive the store.
  //   Status  ResourceExhausted (BUDGET: `limit` is the smallest memory budget that would do).
  static absl::StatusOr<std::unique_ptr<ShardStore>> Create(OwnedShards layout, Tiers* tiers);
  ~ShardStore() override;

  const OwnedShards& layout() const { return layout_; }

  // Reserves optimizer slots and the room of an apply; slots begin as zero. One entry per tensor.
  // The same again: no effect. Another one replaces the slots whose format it changes.
  //   Status  InvalidArgument (a buffer with an optimizer), FailedPrecondition (pieces are staged),
  //   ResourceExhausted (as Create; the old configuration stays, with its contents).
  absl::Status Configure(const std::vector<TensorOptimizer>& optimizers);
  bool IsConfiguredAs(const std::vector<TensorOptimizer>& optimizers) const;

  // ---- Staging ----
  // Replaces the contribution layout: drops what is staged and reserves room for the pieces of
  // every shard. A shard without pieces gets no gradient.
  //   Status  InvalidArgument (unknown shard, bad box, key twice), ResourceExhausted (nothing is
  //   expected then).
  absl::Status SetLayout(const std::vector<ExpectedPiece>& pieces);

  // Begins a gradient piece. `dtype` F32, BF16 or F16; all pieces of a shard that come from exactly
  // one contributor each share it. A piece that is already stored is only hashed: Finish tells its
  // digest, Keep changes nothing.
  //   Status  InvalidArgument (not expected, wrong dtype), NotFound (shard), Unavailable (another
  //   stream is sending it),
  //           ResourceExhausted (BUDGET: no memory for it, or no room on the disk for the apply).
  absl::StatusOr<std::unique_ptr<PieceWriter>> BeginGradient(int32_t shard, uint32_t rank,
                                                             int32_t region, v1::DType dtype);

  // Begins a SetState piece of any slot. fp32 contents of an 8-bit slot are quantised and must
  // cover whole 256-blocks or end with the tensor; "<slot>_absmax" is set by flat boxes of whole
  // blocks, one fp32 per block. A weight may be F32, F16 (with the exact master kept) or BF16
  // (remainder zero unless set too).
  //   Status  InvalidArgument (box, slot or dtype), NotFound, AlreadyExists (overlaps another
  //   piece), Unavailable (another
  //           stream is sending it), ResourceExhausted.
  absl::StatusOr<std::unique_ptr<PieceWriter>> BeginLoad(int32_t shard, Slot slot, v1::DType dtype,
                                                         const Box& box);

  // Slot and box of every SetState piece that is staged for a shard. NotFound: the shard.
  absl::StatusOr<std::vector<std::pair<Slot, Box>>> StagedLoads(int32_t shard) const;

  // All that will come has come: sums contributions in ascending rank, hashes and takes the norm;
  // of a LOAD, fills what pieces did not cover from the present values. Bound to what is staged
  // now, to be run later from any thread: what another attempt stages is never taken for it.
  //   Status  Aborted (dropped before it ran), FailedPrecondition (LOADING: the first LOAD leaves
  //   part of this weight unset, by name), DataLoss.
  using Stager = std::function<absl::StatusOr<StagedShard>()>;
  Stager StagerOf(int32_t shard, bool is_load);
  absl::StatusOr<StagedShard> StageGradient(int32_t shard) { return StagerOf(shard, false)(); }
  absl::StatusOr<StagedShard> StageLoad(int32_t shard) { return StagerOf(shard, true)(); }
  void DropStaged();
  void DropStaged(int32_t shard);

  // ---- Apply ----
  // Makes version update.step of a shard, as one unit, and frees what was staged. The version must
  // be step - 1 (any, for a LOAD).
  //   Status  DataLoss (a spilled slot is damaged: the shard keeps its version), FailedPrecondition
  //   (wrong version, not staged),
  //           ResourceExhausted (a failing disk took back nothing of earlier applies: nothing has
  //           changed, try again).
  //   Of an optimizer that looks at a whole tensor first (kernels::Scope), update.look is given.
  //   Aborted: a flush was loaded since update.loads.
  absl::Status Apply(int32_t shard, const ShardUpdate& update);
  int64_t loads() const { return loads_; }
  // The first phase of a step of such a tensor, all of whose shards are here, at one version,
  // staged and not being applied. Changes nothing, so that it may be done again. One matrix at a
  // time: its memory comes back when the last update that has the look is gone.
  //   Status  as Apply; ResourceExhausted: no memory for it now
  absl::StatusOr<std::shared_ptr<const TensorLook>> Look(uint32_t tensor,
                                                         const ShardUpdate& update);
  // Shards in order of next use: as pulled at the last version that was pulled, then as at the one
  // before, then manifest order.
  std::vector<int32_t> NextUseOrder() const;

  // ---- Reading ----
  // Opens a read of one slot at an exact version; see ShardReader.
  //   Status  InvalidArgument (box, slot, dtype), NotFound (shard), OutOfRange (VERSION_GONE),
  //   FailedPrecondition (LOADING; not
  //           made yet), DataLoss.
  absl::StatusOr<std::unique_ptr<ShardReader>> OpenRead(const ReadRequest& request);

  // ---- What can be seen ----
  absl::StatusOr<int64_t> version(int32_t shard) const;  // -1: LOADING
  absl::StatusOr<ShardStatus> Describe(int32_t shard) const;
  // Bytes at rest of all slots of a tensor, over the shards here.
  uint64_t RestBytes(uint32_t tensor) const;
  const std::vector<TensorOptimizer>& optimizers() const { return optimizers_; }

  uint64_t SpillCold(uint64_t wanted_bytes) override;

 private:
  friend class FlushAccess;  // server/durability/flush.cc: reads and restores everything

  ShardStore(OwnedShards layout, Tiers* tiers);
  absl::StatusOr<Shard*> Find(int32_t id) const;

  absl::Status PlaceSlot(Shard* shard, Slot slot, SlotFormat format);
  struct ReplacedSlot;
  absl::Status PlaceOptimizerSlots(std::vector<ReplacedSlot>* replaced);
  static SlotState TakeSlot(Shard* shard, Slot slot);
  static bool HasStaged(const Shard& shard);
  absl::StatusOr<Reservation> ReserveWithoutOwn(const Use& use, uint64_t bytes);
  absl::Status WithSmallestBudget(const absl::Status& status) const;

  bool window_open() const;
  uint64_t WindowBytes() const;
  bool SpillPays(uint64_t window_bytes) const;
  absl::Status GrowWindow(uint64_t bytes);
  absl::Status OpenWindow();
  absl::Status EnsureWindow(uint64_t bytes);
  uint64_t SpillSome(uint64_t wanted_bytes);
  absl::StatusOr<uint64_t> SpillSlot(Shard* shard, Slot slot);

  absl::Status CheckDiskForApply() const;
  BufferPtr ReservedStaging(uint64_t bytes);  // of what SetLayout reserved; null: used up
  absl::StatusOr<BufferPtr> StagingBuffer(uint64_t bytes);
  absl::StatusOr<std::unique_ptr<PieceWriter>> TryBeginLoad(int32_t shard, Slot slot,
                                                            v1::DType dtype, const Box& box);
  absl::StatusOr<StagedShard> SumGradient(const Shard& shard, GradientStage* stage);
  absl::StatusOr<StagedShard> FillLoad(Shard* shard, const std::shared_ptr<LoadStage>& stage);
  absl::Status LeaseWindow(const Shard& shard, std::optional<WindowLease>* lease);
  absl::StatusOr<BufferPtr> BringSlot(Shard* shard, Slot slot);
  absl::Status ApplyGradient(Shard* shard, const ShardUpdate& update);
  absl::Status LookAtShard(Shard* shard, const ShardUpdate& update, TensorLook* look);
  absl::Status LookForAverages(Shard* shard, absl::Span<float> rows, absl::Span<float> columns);
  uint64_t LookBytes() const;
  absl::Status ReserveLook();
  void WriteBackStranded();
  absl::Status ApplyLoad(Shard* shard, const ShardUpdate& update);
  // A slot's present bytes for reading; null: initial.
  absl::StatusOr<BufferPtr> Contents(const Shard& shard, Slot slot, const SlotState& state);

  const OwnedShards layout_;
  Tiers* const tiers_;
  std::vector<std::unique_ptr<Shard>> shards_;  // as layout_.shards
  std::vector<TensorOptimizer>
      optimizers_;  // per tensor; written by Configure alone, which nothing may run beside
  bool configured_ = false;
  std::atomic<int64_t> loads_ = 0;           // of flushes begun
  std::atomic<bool> configuring_ = false;    // nothing new is staged
  std::atomic<bool> keep_resident_ = false;  // SpillCold moves nothing of this job
  mutable Mutex mutex_;                      // configuration, reservations, order of use
  CondVar window_free_;
  bool window_busy_ GUARDED_BY(mutex_) = false;
  // One apply's slots, and the same on disk: a new value before the old one goes. They only grow.
  Reservation window_ GUARDED_BY(mutex_), spill_window_ GUARDED_BY(mutex_);
  std::shared_ptr<Reservation> staging_ GUARDED_BY(mutex_);
  Reservation look_ GUARDED_BY(mutex_);  // at all factored tensors and at the largest matrix
  // First pulls of weights, in order: of the newest version pulled, and of the one before it.
  int64_t pulled_version_ GUARDED_BY(mutex_) = -1;
  std::vector<int32_t> pulled_ GUARDED_BY(mutex_);
  std::set<int32_t> pulled_seen_ GUARDED_BY(mutex_);
  std::vector<int32_t> pulled_before_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
