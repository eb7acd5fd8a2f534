// Internals of ShardStore: one shard with its slots and what is staged for it.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "server/shards/shard_store.h"

namespace orlop::server {

// Present contents of one slot. Bytes are in `data`, or on disk in `spilled`, or (neither) all
// equal to the format's initial byte.
struct SlotState {
  SlotFormat format;
  Tier tier = Tier::kDram;  // where its room is
  Reservation room;
  BufferPtr data;  // of an NVME slot: only while the disk refuses to take it back
  std::optional<SpilledSlot> spilled;
};

// What a gradient lies in memory as: int8 is decoded when it comes.
inline v1::DType StagedDType(v1::DType wire) {
  return wire == v1::DTYPE_I8_BLOCK ? v1::DTYPE_BF16 : wire;
}

// A gradient piece that the layout asks for.
struct GradientPiece {
  ExpectedPiece expected;
  Range part;            // of the box's buffer, in elements
  bool claimed = false;  // a stream is writing it
  bool stored = false;
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;  // on the wire; see StagedDType
  BufferPtr bytes;                          // its own; null: it lies in GradientStage::whole
  PieceResult result;
};

// What is staged of one shard's gradient in one attempt. Writers hold it too: dropping it leaves
// them harmless.
struct GradientStage {
  Mutex mutex;
  std::vector<GradientPiece> pieces GUARDED_BY(mutex);  // by rank, then region
  bool direct GUARDED_BY(mutex) =
      false;  // every element comes from one contributor: pieces lie in `whole`
  bool dropped GUARDED_BY(mutex) = false;
  v1::DType dtype GUARDED_BY(mutex) = v1::DTYPE_UNSPECIFIED;  // of `whole`
  BufferPtr whole GUARDED_BY(mutex);
  std::optional<StagedShard> result GUARDED_BY(mutex);
};

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
  BufferPtr data;
  Reservation room;  // of `data`; empty if that came from the slot's own room
  std::optional<SpilledSlot>
      spilled;       // whole contents that already lie on disk; then `data` is null
  Digest128 digest;  // of them
};

struct LoadStage {
  Mutex mutex;
  std::vector<LoadPiece> pieces GUARDED_BY(mutex);
  std::array<LoadPlane, kStoredSlotCount> planes GUARDED_BY(mutex);
  bool dropped GUARDED_BY(mutex) = false;
  std::optional<StagedShard> result GUARDED_BY(mutex);
};

struct Shard {
  Shard(const OwnedShard& info, const Tensor* tensor) : info(info), tensor(tensor) {}

  const OwnedShard info;
  const Tensor* const tensor;

  mutable Mutex mutex;
  CondVar idle;
  bool busy GUARDED_BY(mutex) =
      false;  // an apply or a spill works on the slots; they change under `mutex` all the same
  bool applying GUARDED_BY(mutex) = false;
  int64_t version GUARDED_BY(mutex) = -1;
  std::array<SlotState, kStoredSlotCount> slots GUARDED_BY(mutex);
  std::vector<ExpectedPiece> expected GUARDED_BY(mutex);
  std::shared_ptr<GradientStage> gradient GUARDED_BY(mutex);
  std::shared_ptr<LoadStage> load GUARDED_BY(mutex);

  uint64_t count() const { return info.range.count(); }
  std::string Name() const {
    return absl::StrCat("tensor '", tensor->name, "', shard ", info.index);
  }
  SlotKey Key(const std::string& job, Slot slot) const {
    return {job, info.id, slot, tensor->name};
  }
  // Waits until nobody works on the slots, and takes them.
  void Acquire() EXCLUDES(mutex) {
    MutexLock lock(&mutex);
    while (busy) idle.Wait(&mutex);
    busy = true;
  }
  void Release() EXCLUDES(mutex) {
    MutexLock lock(&mutex);
    busy = applying = false;
    idle.SignalAll();
  }
};

// An error about a shard, with its detail.
absl::Status ShardError(absl::StatusCode code, const Shard& shard, const std::string& message,
                        v1::ErrorDetail::Reason reason = v1::ErrorDetail::BAD_REQUEST);
// What was staged here belongs to an attempt that is over.
inline absl::Status AttemptDropped(const Shard& shard) {
  return ShardError(absl::StatusCode::kAborted, shard, "the attempt was dropped",
                    v1::ErrorDetail::STALE_ATTEMPT);
}

// The tree digest of contiguous bytes (base/checksum.h).
Digest128 DigestOf(absl::Span<const uint8_t> bytes);

// A fresh buffer of a slot, every byte the initial one.
absl::StatusOr<BufferPtr> InitialBuffer(const SlotFormat& format, uint64_t bytes,
                                        Reservation* room);

// Of a float dtype.
inline kernels::DType KernelDType(v1::DType dtype) {
  return dtype == v1::DTYPE_F32    ? kernels::DType::kF32
         : dtype == v1::DTYPE_BF16 ? kernels::DType::kBF16
                                   : kernels::DType::kF16;
}

// The slots of one shard while a step reads and writes them: buffers, null where the tensor has no
// such slot.
struct WorkingSlots {
  std::array<BufferPtr, kStoredSlotCount> buffers;
  std::array<Reservation, kStoredSlotCount>
      rooms;             // of fresh buffers that replace ones that readers hold
  BufferPtr old_weight;  // what a reader still holds; null: the weight is written in place

  template <typename T>
  absl::Span<T> as(Slot slot) {
    const BufferPtr& buffer = buffers[static_cast<size_t>(slot)];
    return buffer ? buffer->as<T>() : absl::Span<T>();
  }
};
// The step of a shard in these slots.
kernels::RangeStep RangeStepOf(const ShardUpdate& update, const TensorOptimizer& optimizer,
                               const OwnedShard& shard, kernels::TypedSpan gradient,
                               WorkingSlots* slots);
// What is staged of a shard: held as long as it is read. Of one that no contributor had a gradient
// for, though of others of its tensor there was one: zeros.
struct StagedGradient {
  std::shared_ptr<GradientStage> stage;
  bool absent = false;
  kernels::TypedSpan values;
};
// FailedPrecondition: pieces have come and were not summed.
absl::StatusOr<StagedGradient> StagedGradientOf(Shard* shard);

// Holds the job's window for one apply, or look, that brings spilled slots back.
class WindowLease {
 public:
  WindowLease(Mutex* mutex, CondVar* free, bool* busy);
  ~WindowLease();

 private:
  Mutex* const mutex_;
  CondVar* const free_;
  bool* const busy_;
};

// Walks the runs of (box within a shard) along ascending bytes of a piece. `visit(local, count,
// first)`: elements [local, local + count) of the shard are elements [first, first + count) of the
// span given to Advance.
class RunCursor {
 public:
  RunCursor(const Shard& shard, const Box& box)
      : begin_(shard.info.range.begin),
        runs_(Simplified(box, shard.tensor->shape), shard.tensor->shape, shard.info.range) {}

  template <typename Visit>
  absl::Status Advance(uint64_t element_count, Visit visit) {
    for (uint64_t done = 0; done < element_count;) {
      if (used_ == run_.count) {
        used_ = 0;
        if (!runs_.Next(&run_)) return absl::InternalError("piece is longer than its box");
      }
      const uint64_t take = std::min<uint64_t>(element_count - done, run_.count - used_);
      absl::Status status = visit(run_.tensor_begin + used_ - begin_, take, done);
      if (!status.ok()) return status;
      used_ += take;
      done += take;
    }
    return absl::OkStatus();
  }

 private:
  const uint64_t begin_;
  RunIterator runs_;
  Run run_;
  uint64_t used_ = 0;
};

}  // namespace orlop::server
