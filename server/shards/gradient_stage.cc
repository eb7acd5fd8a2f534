// Staging of gradients: expected pieces, room for them, and the sum, digest and norm of a shard
// once all have come.
#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

#include "kernels/casts.h"
#include "kernels/int8_blocks.h"
#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/shards/shard.h"

namespace orlop::server {
namespace {

// A piece that lies in memory as it comes. `owner` keeps the memory while the stream lives.
class FlatSink : public PieceSink {
 public:
  FlatSink(BufferPtr owner, uint64_t offset_bytes)
      : owner_(std::move(owner)), offset_bytes_(offset_bytes) {}
  uint8_t* Destination() override { return owner_->data() + offset_bytes_; }

 private:
  const BufferPtr owner_;
  const uint64_t offset_bytes_;
};

// A box with gaps, scattered to its places in the shard.
class ScatterSink : public PieceSink {
 public:
  ScatterSink(BufferPtr owner, const Shard& shard, const Box& box, size_t element_bytes)
      : owner_(std::move(owner)), element_bytes_(element_bytes), cursor_(shard, box) {}
  absl::Status Write(uint64_t, absl::Span<const uint8_t> bytes) override {
    return cursor_.Advance(
        bytes.size() / element_bytes_, [&](uint64_t local, uint64_t count, uint64_t first) {
          std::memcpy(owner_->data() + local * element_bytes_,
                      bytes.data() + first * element_bytes_, count * element_bytes_);
          return absl::OkStatus();
        });
  }

 private:
  const BufferPtr owner_;
  const size_t element_bytes_;
  RunCursor cursor_;
};

// int8 with block scales, decoded to bf16 on its way to another sink.
class Int8Sink : public PieceSink {
 public:
  // Whole blocks, about 64 KiB.
  static constexpr uint64_t kSinkBytes = 252 * kernels::kInt8BlockBytes;

  Int8Sink(std::unique_ptr<PieceSink> sink, std::string name)
      : sink_(std::move(sink)), name_(std::move(name)), destination_(sink_->Destination()) {}
  absl::Status Write(uint64_t offset_bytes, absl::Span<const uint8_t> bytes) override {
    const uint64_t first = kernels::Int8Count(offset_bytes),
                   count = kernels::Int8Count(bytes.size());
    uint16_t* values = reinterpret_cast<uint16_t*>(destination_) + first;
    if (destination_ == nullptr) {
      decoded_.resize(count);
      values = decoded_.data();
    }
    if (absl::Status status = kernels::DecodeInt8(bytes, {values, count}); !status.ok())
      return MakeError(status.code(),
                       absl::StrCat(name_, ", elements from ", first,
                                    " of the piece: ", std::string(status.message())),
                       v1::ErrorDetail::BAD_REQUEST);
    if (destination_ != nullptr) return absl::OkStatus();
    return sink_->Write(first * sizeof(uint16_t),
                        {reinterpret_cast<const uint8_t*>(values), count * sizeof(uint16_t)});
  }

 private:
  const std::unique_ptr<PieceSink> sink_;
  const std::string name_;
  uint8_t* const destination_;
  std::vector<uint16_t> decoded_;
};

Range PartOf(const Shard& shard, const Box& box) {
  return BoxPart(box, shard.tensor->shape, shard.info.range);
}

bool IsDirect(const Shard& shard, const std::vector<ExpectedPiece>& expected) {
  uint64_t count = 0;
  for (const ExpectedPiece& piece : expected) count += PartOf(shard, piece.box).count();
  return count == shard.count();
}

// One contributor: its bytes. Several: the part of each, and their fp32 sum.
uint64_t StagingBytes(const Shard& shard, const std::vector<ExpectedPiece>& expected) {
  const uint64_t element_bytes = ElementBytes(shard.tensor->dtype);
  if (expected.empty()) return 0;
  if (IsDirect(shard, expected)) return Buffer::Footprint(shard.count() * element_bytes);
  uint64_t bytes = Buffer::Footprint(shard.count() * sizeof(float));
  for (const ExpectedPiece& piece : expected)
    bytes += Buffer::Footprint(PartOf(shard, piece.box).count() * element_bytes);
  return bytes;
}

// Called with the shard's lock held, so without the stage's, which is taken the other way round
// (StagingBuffer): nobody else has this one yet.
std::shared_ptr<GradientStage> NewStage(
    const Shard& shard, const std::vector<ExpectedPiece>& expected) NO_THREAD_SAFETY_ANALYSIS {
  auto stage = std::make_shared<GradientStage>();
  for (const ExpectedPiece& piece : expected)
    stage->pieces.push_back({piece, PartOf(shard, piece.box)});
  stage->direct = IsDirect(shard, expected);
  return stage;
}

// Adds to `sum` (elements [range) of the shard) the elements of a piece that lie there.
absl::Status AddPiece(const Shard& shard, const GradientPiece& piece, Range range,
                      absl::Span<float> sum) {
  const Range flat = {shard.info.range.begin + range.begin, shard.info.range.begin + range.end};
  const kernels::DType dtype = KernelDType(StagedDType(piece.dtype));
  const uint64_t element_bytes = kernels::SizeOf(dtype);
  uint64_t at =
      BoxElementsBelow(piece.expected.box, shard.tensor->shape, flat.begin) - piece.part.begin;
  absl::Status status;
  ForEachRun(piece.expected.box, shard.tensor->shape, flat, [&](Range run) {
    if (!status.ok()) return;
    status =
        kernels::AccumulateToF32({dtype, piece.bytes->data() + at * element_bytes, run.count()},
                                 sum.subspan(run.begin - flat.begin, run.count()));
    at += run.count();
  });
  return status;
}

// Norm and digest of a shard's gradient, leaf by leaf; `fill` makes the leaf first where it is a
// sum.
template <typename Fill>
absl::StatusOr<StagedShard> Reduce(const Shard& shard, v1::DType dtype, const uint8_t* bytes,
                                   Fill fill) {
  const uint64_t element_bytes = ElementBytes(dtype), leaf_elements = kLeafBytes / element_bytes;
  kernels::BlockSums sums;
  PieceDigest digest;
  for (uint64_t begin = 0; begin < shard.count(); begin += leaf_elements) {
    const Range range = {begin, std::min(begin + leaf_elements, shard.count())};
    if (absl::Status filled = fill(range); !filled.ok()) return filled;
    const uint8_t* leaf = bytes + begin * element_bytes;
    kernels::ReduceGradient({KernelDType(dtype), leaf, range.count()}, &sums);
    const uint64_t hash = Checksum64(leaf, range.count() * element_bytes);
    digest.AddLeaves({&hash, 1});
  }
  return StagedShard{digest.Finish(), sums.sum_squares, sums.nonfinite_count, false};
}

// Elements of contributors that had no gradient are zero.
void ZeroAbsent(const Shard& shard, const std::vector<GradientPiece>& pieces,
                uint64_t element_bytes, uint8_t* whole) {
  for (const GradientPiece& piece : pieces)
    if (!piece.stored)
      ForEachRun(piece.expected.box, shard.tensor->shape, shard.info.range, [&](Range run) {
        std::memset(whole + (run.begin - shard.info.range.begin) * element_bytes, 0,
                    run.count() * element_bytes);
      });
}

}  // namespace

// A committed step must not wait for a disk: one that is full is told while the step can still be
// refused.
absl::Status ShardStore::CheckDiskForApply() const {
  uint64_t bytes;
  {
    MutexLock lock(&mutex_);
    bytes = spill_window_.reserved_bytes();
  }
  return bytes == 0 ? absl::OkStatus() : tiers_->CheckDisk(layout_.job, bytes);
}

BufferPtr ShardStore::ReservedStaging(uint64_t bytes) {
  std::shared_ptr<Reservation> staging;
  {
    MutexLock lock(&mutex_);
    staging = staging_;
  }
  return staging ? staging->Allocate(bytes).value_or(nullptr) : nullptr;
}

absl::StatusOr<BufferPtr> ShardStore::StagingBuffer(uint64_t bytes) {
  if (BufferPtr buffer = ReservedStaging(bytes)) return buffer;
  WriteBackStranded();  // what a LOAD left here while the disk was full
  if (BufferPtr buffer = ReservedStaging(bytes)) return buffer;
  // Wider than the manifest's dtype, or what a broken stream still holds is not back yet.
  return tiers_->NewBuffer({Tier::kDram, layout_.job, "staging"}, bytes);
}

absl::Status ShardStore::SetLayout(const std::vector<ExpectedPiece>& pieces) {
  std::map<int32_t, std::vector<ExpectedPiece>> by_shard;
  for (const ExpectedPiece& piece : pieces) {
    auto shard = Find(piece.shard);
    if (!shard.ok()) return shard.status();
    const Tensor& tensor = *(*shard)->tensor;
    absl::Status valid = ValidateBox(piece.box, tensor.shape, tensor.element_count);
    if (!valid.ok()) return ShardError(valid.code(), **shard, std::string(valid.message()));
    if (PartOf(**shard, piece.box).empty())
      return ShardError(absl::StatusCode::kInvalidArgument, **shard,
                        absl::StrCat("box ", ToString(piece.box), " does not touch it"));
    by_shard[piece.shard].push_back(piece);
  }
  DropStaged();
  {
    MutexLock lock(&mutex_);
    staging_.reset();
  }
  uint64_t bytes = 0;
  for (auto& shard : shards_) {
    std::vector<ExpectedPiece>& expected = by_shard[shard->info.id];
    std::sort(expected.begin(), expected.end(), [](const ExpectedPiece& a, const ExpectedPiece& b) {
      return std::pair(a.rank, a.region) < std::pair(b.rank, b.region);
    });
    for (size_t i = 1; i < expected.size(); ++i)
      if (expected[i].rank == expected[i - 1].rank && expected[i].region == expected[i - 1].region)
        return ShardError(absl::StatusCode::kInvalidArgument, *shard,
                          absl::StrCat("rank ", expected[i].rank, " has two boxes of region ",
                                       expected[i].region));
    bytes += StagingBytes(*shard, expected);
    MutexLock lock(&shard->mutex);
    shard->expected.clear();
  }
  auto reserved = tiers_->Reserve({Tier::kDram, layout_.job, "staging"}, bytes);
  if (!reserved.ok()) return reserved.status();
  for (auto& shard : shards_) {
    MutexLock lock(&shard->mutex);
    shard->expected = std::move(by_shard[shard->info.id]);
  }
  MutexLock lock(&mutex_);
  staging_ = std::make_shared<Reservation>(*std::move(reserved));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<PieceWriter>> ShardStore::BeginGradient(int32_t id, uint32_t rank,
                                                                       int32_t region,
                                                                       v1::DType dtype) {
  auto found = Find(id);
  if (!found.ok()) return found.status();
  Shard& shard = **found;
  if (!IsGradient(dtype))
    return ShardError(
        absl::StatusCode::kInvalidArgument, shard,
        absl::StrCat("a gradient is float32, bfloat16, float16 or int8 with block scales, not ",
                     std::string(DTypeName(dtype))));
  if (absl::Status room = CheckDiskForApply(); !room.ok()) return Annotated(room, shard.Name());
  std::shared_ptr<GradientStage> stage;
  {
    MutexLock lock(&shard.mutex);
    if (!shard.gradient) shard.gradient = NewStage(shard, shard.expected);
    stage = shard.gradient;
  }
  MutexLock lock(&stage->mutex);
  const auto piece =
      std::find_if(stage->pieces.begin(), stage->pieces.end(), [&](const GradientPiece& p) {
        return p.expected.rank == rank && p.expected.region == region;
      });
  if (piece == stage->pieces.end())
    return ShardError(absl::StatusCode::kInvalidArgument, shard,
                      absl::StrCat("no piece of rank ", rank, ", region ", region, " is expected"));
  const size_t index = piece - stage->pieces.begin();
  const v1::DType staged_dtype = StagedDType(dtype);
  const uint64_t element_bytes = ElementBytes(staged_dtype);
  PieceWriter::Options options{PieceBytes(dtype, piece->part.count()), KernelDType(staged_dtype),
                               false, absl::StrCat(shard.Name(), ", rank ", rank)};
  if (piece->stored) {
    if (piece->dtype != dtype)
      return ShardError(absl::StatusCode::kAlreadyExists, shard,
                        absl::StrCat("rank ", rank, " has pushed this piece as ",
                                     std::string(DTypeName(piece->dtype))),
                        v1::ErrorDetail::CONFLICT);
    return std::make_unique<PieceWriter>(options, std::make_unique<PieceSink>(), nullptr, nullptr);
  }
  if (piece->claimed)
    return ShardError(absl::StatusCode::kUnavailable, shard,
                      absl::StrCat("another stream of rank ", rank, " is sending this piece"),
                      v1::ErrorDetail::STOPPING);
  std::unique_ptr<PieceSink> sink;
  BufferPtr own;
  if (stage->direct) {
    if (stage->whole && stage->dtype != staged_dtype)
      return ShardError(
          absl::StatusCode::kInvalidArgument, shard,
          absl::StrCat("pieces of this shard are ", std::string(DTypeName(stage->dtype)), ", not ",
                       std::string(DTypeName(staged_dtype))));
    if (!stage->whole) {
      auto buffer = StagingBuffer(shard.count() * element_bytes);
      if (!buffer.ok()) return Annotated(buffer.status(), shard.Name());
      stage->whole = *std::move(buffer);
      stage->dtype = staged_dtype;
    }
    const Box simple = Simplified(piece->expected.box, shard.tensor->shape);
    options.reduce = stage->pieces.size() == 1 && staged_dtype == dtype;
    if (simple.flat) {
      const uint64_t first =
          std::max(simple.offset[0], shard.info.range.begin) - shard.info.range.begin;
      sink = std::make_unique<FlatSink>(stage->whole, first * element_bytes);
    } else {
      sink = std::make_unique<ScatterSink>(stage->whole, shard, simple, element_bytes);
    }
  } else {
    auto buffer = StagingBuffer(piece->part.count() * element_bytes);
    if (!buffer.ok()) return Annotated(buffer.status(), shard.Name());
    own = *std::move(buffer);
    sink = std::make_unique<FlatSink>(own, 0);
  }
  if (staged_dtype != dtype) {
    options.sink_bytes = Int8Sink::kSinkBytes;
    sink = std::make_unique<Int8Sink>(std::move(sink), options.name);
  }
  piece->claimed = true;
  auto keep = [&shard, stage, index, dtype, own](const PieceResult& result) -> absl::Status {
    MutexLock lock(&stage->mutex);
    if (stage->dropped) return AttemptDropped(shard);
    GradientPiece& piece = stage->pieces[index];
    piece.stored = true;
    piece.dtype = dtype;
    piece.bytes = own;
    piece.result = result;
    return absl::OkStatus();
  };
  auto release = [stage, index] {
    MutexLock lock(&stage->mutex);
    stage->pieces[index].claimed = false;
  };
  return std::make_unique<PieceWriter>(options, std::move(sink), std::move(keep),
                                       std::move(release));
}

ShardStore::Stager ShardStore::StagerOf(int32_t id, bool is_load) {
  auto found = Find(id);
  if (!found.ok()) return [status = found.status()] { return status; };
  Shard* shard = *found;
  MutexLock lock(&shard->mutex);
  if (is_load) {
    return [this, shard, stage = shard->load] {
      shard->Acquire();  // slots are read: nothing may move them
      auto staged = FillLoad(shard, stage);
      shard->Release();
      return staged;
    };
  }
  if (!shard->gradient) shard->gradient = NewStage(*shard, shard->expected);
  return [this, shard, stage = shard->gradient] { return SumGradient(*shard, stage.get()); };
}

absl::StatusOr<StagedShard> ShardStore::SumGradient(const Shard& shard, GradientStage* stage) {
  MutexLock lock(&stage->mutex);
  if (stage->dropped) return AttemptDropped(shard);
  if (stage->result) return *stage->result;
  std::vector<GradientPiece>& pieces = stage->pieces;
  const bool any =
      std::any_of(pieces.begin(), pieces.end(), [](const GradientPiece& p) { return p.stored; });
  absl::StatusOr<StagedShard> staged = StagedShard{.absent = true};
  if (any && stage->direct && pieces.size() == 1 && pieces[0].dtype == stage->dtype) {
    const PieceResult& result = pieces[0].result;
    staged =
        StagedShard{result.digest, result.sums.sum_squares, result.sums.nonfinite_count, false};
  } else if (any && stage->direct) {
    ZeroAbsent(shard, pieces, ElementBytes(stage->dtype), stage->whole->data());
    staged =
        Reduce(shard, stage->dtype, stage->whole->data(), [](Range) { return absl::OkStatus(); });
  } else if (any) {
    auto sum = StagingBuffer(shard.count() * sizeof(float));
    if (!sum.ok()) return Annotated(sum.status(), shard.Name());
    const absl::Span<float> values = (*sum)->as<float>();
    staged = Reduce(shard, v1::DTYPE_F32, (*sum)->data(), [&](Range range) -> absl::Status {
      const absl::Span<float> part = values.subspan(range.begin, range.count());
      std::fill(part.begin(), part.end(),
                -0.0f);  // the one value that changes no first contribution
      for (const GradientPiece& piece : pieces)
        if (piece.stored)
          if (absl::Status added = AddPiece(shard, piece, range, part); !added.ok()) return added;
      return absl::OkStatus();
    });
    for (GradientPiece& piece : pieces) piece.bytes.reset();
    stage->whole = *std::move(sum);
    stage->dtype = v1::DTYPE_F32;
  }
  if (staged.ok()) stage->result = *staged;
  return staged;
}

void ShardStore::DropStaged() {
  for (auto& shard : shards_) DropStaged(shard->info.id);
}

void ShardStore::DropStaged(int32_t id) {
  auto found = Find(id);
  if (!found.ok()) return;
  std::shared_ptr<GradientStage> gradient;
  std::shared_ptr<LoadStage> load;
  {
    MutexLock lock(&(*found)->mutex);
    gradient = std::move((*found)->gradient);
    load = std::move((*found)->load);
    (*found)->gradient = nullptr;
    (*found)->load = nullptr;
  }
  if (gradient) {
    MutexLock lock(&gradient->mutex);
    gradient->dropped = true;
  }
  if (load) {
    MutexLock lock(&load->mutex);
    load->dropped = true;
    for (size_t i = 0; i < kStoredSlotCount; ++i)
      if (load->planes[i].spilled)  // a failed erase leaves bytes that the next start removes
        (void)tiers_->Erase((*found)->Key(layout_.job, static_cast<Slot>(i)),
                            *load->planes[i].spilled);
  }
}

}  // namespace orlop::server
