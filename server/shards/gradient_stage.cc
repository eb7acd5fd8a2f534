#include "server/shards/gradient_stage.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "base/mutex.h"
#include "kernels/types.h"
#include "orlop/v1/types.pb.h"
#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/job/contributions.h"
#include "server/memory/accountant.h"
#include "server/shards/gradient_sinks.h"
#include "server/shards/gradient_sum.h"
#include "server/shards/piece_writer.h"
#include "server/shards/shard_info.h"
#include "server/shards/staged.h"
#include "server/shards/staging_room.h"

namespace orlop::server {
namespace {

// Returns kMaxShardElements zeros in bf16, the gradient of any shard without one. They take no
// memory, because their pages are never written.
const void* Zeros() {
  static const void* const zeros = mmap(nullptr, 2 * kMaxShardElements, PROT_READ,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return zeros;
}

// Whether a buffer holds `count` values of a gradient's staged dtype.
bool Holds(const BufferPtr& bytes, v1::DType dtype, uint64_t count) {
  return bytes != nullptr && IsFloat(dtype) && bytes->size() == count * ElementBytes(dtype);
}

}  // namespace

StagedGradient AbsentGradient(const ShardInfo& shard) {
  return {nullptr, true, {kernels::DType::kBF16, Zeros(), shard.count()}};
}

GradientStage::GradientStage(const ShardInfo& shard, const std::vector<ExpectedPiece>& expected,
                             StagingRoom* room)
    : shard_(shard), room_(room), direct_(IsDirect(shard, expected)) {
  MutexLock lock(&mutex_);
  for (const ExpectedPiece& piece : expected) pieces_.push_back({piece, PartOf(shard, piece.box)});
}

// ---- Pieces ----

class GradientStage::Claim : public PieceClaim {
 public:
  Claim(std::shared_ptr<GradientStage> stage, size_t index, v1::DType dtype)
      : stage_(std::move(stage)), index_(index), dtype_(dtype) {}
  ~Claim() override {
    MutexLock lock(&stage_->mutex_);
    stage_->pieces_[index_].claimed = false;
  }
  // Sets the buffer of a piece that is not direct.
  void set_bytes(BufferPtr bytes) { bytes_ = std::move(bytes); }
  absl::Status Keep(const PieceResult& result) override {
    MutexLock lock(&stage_->mutex_);
    if (stage_->dropped_) return AttemptDropped(stage_->shard_);
    GradientPiece& piece = stage_->pieces_[index_];
    piece.stored = true;
    piece.dtype = dtype_;
    piece.bytes = std::move(bytes_);
    piece.result = result;
    return absl::OkStatus();
  }

 private:
  const std::shared_ptr<GradientStage> stage_;
  const size_t index_;
  const v1::DType dtype_;
  BufferPtr bytes_;
};

absl::StatusOr<GradientStage::Begun> GradientStage::ClaimPiece(uint32_t rank, int32_t region,
                                                               v1::DType dtype) {
  MutexLock lock(&mutex_);
  const auto piece = std::ranges::find_if(pieces_, [&](const GradientPiece& p) {
    return p.expected.rank == rank && p.expected.region == region;
  });
  if (piece == pieces_.end())
    return ShardError(absl::StatusCode::kInvalidArgument, shard_,
                      absl::StrCat("no piece of rank ", rank, ", region ", region, " is expected"));
  if (piece->stored && piece->dtype != dtype)
    return ShardError(absl::StatusCode::kAlreadyExists, shard_,
                      absl::StrCat("rank ", rank, " has pushed this piece as ",
                                   std::string(DTypeName(piece->dtype))),
                      v1::ErrorDetail::CONFLICT);
  if (!piece->stored && piece->claimed)
    return ShardBusy(shard_,
                     absl::StrCat("another stream of rank ", rank, " is sending this piece"));
  if (!piece->stored && direct_ && whole_ && dtype_ != StagedDType(dtype))
    return ShardError(absl::StatusCode::kInvalidArgument, shard_,
                      absl::StrCat("pieces of this shard are ", std::string(DTypeName(dtype_)),
                                   ", not ", std::string(DTypeName(StagedDType(dtype)))));
  if (!piece->stored) piece->claimed = true;
  return Begun{static_cast<size_t>(piece - pieces_.begin()), piece->expected.box, piece->part,
               piece->stored};
}

absl::StatusOr<std::unique_ptr<PieceWriter>> GradientStage::Begin(uint32_t rank, int32_t region,
                                                                  v1::DType dtype) {
  MutexLock work(&work_mutex_);
  const auto begun = ClaimPiece(rank, region, dtype);
  if (!begun.ok()) return begun.status();
  const v1::DType staged_dtype = StagedDType(dtype);
  PieceWriter::Options options{PieceBytes(dtype, begun->part.count()), KernelDType(staged_dtype),
                               false, absl::StrCat(shard_.Name(), ", rank ", rank)};
  if (begun->repeated)
    return std::make_unique<PieceWriter>(options, std::make_unique<PieceSink>(), nullptr);
  auto claim = std::make_unique<Claim>(shared_from_this(), begun->index, dtype);
  std::unique_ptr<PieceSink> sink;
  if (direct_) {
    // Elements that no piece sets are zero.
    const bool is_all = begun->part.count() == shard_.count();
    auto whole = Whole(staged_dtype, is_all ? Fill::kNothing : Fill::kZeros);
    if (!whole.ok()) return Annotated(whole.status(), shard_.Name());
    options.reduce = begun->part.count() == shard_.count() && staged_dtype == dtype;
    sink = BoxSink(*std::move(whole), shard_, Simplified(begun->box, shard_.tensor->shape),
                   staged_dtype);
  } else {
    auto own = room_->Allocate(begun->part.count() * ElementBytes(staged_dtype), Fill::kNothing);
    if (!own.ok()) return Annotated(own.status(), shard_.Name());
    claim->set_bytes(*own);
    sink = FlatSink(*std::move(own), 0);
  }
  if (staged_dtype != dtype) sink = Int8Sink(std::move(sink), &options);
  return std::make_unique<PieceWriter>(options, std::move(sink), std::move(claim));
}

// Returns the buffer in which direct pieces have their places. The first piece creates it.
absl::StatusOr<BufferPtr> GradientStage::Whole(v1::DType dtype, Fill fill) {
  {
    MutexLock lock(&mutex_);
    if (whole_) return whole_;
  }
  auto buffer = room_->Allocate(shard_.count() * ElementBytes(dtype), fill);
  if (!buffer.ok()) return buffer.status();
  MutexLock lock(&mutex_);
  whole_ = *buffer;
  dtype_ = dtype;
  return buffer;
}

// ---- The sum ----

bool GradientStage::HasPieces() const {
  return std::ranges::any_of(pieces_, &GradientPiece::stored);
}

absl::StatusOr<StagedShard> GradientStage::Sum() {
  MutexLock work(&work_mutex_);
  std::vector<GradientPiece> pieces;
  BufferPtr whole;
  v1::DType dtype;
  {
    MutexLock lock(&mutex_);
    if (dropped_) return AttemptDropped(shard_);
    if (result_) return *result_;
    if (!HasPieces()) return *(result_ = StagedShard{.absent = true});
    pieces = pieces_;
    whole = whole_;
    dtype = dtype_;
  }
  if (!direct_) return SumSeveral(pieces);
  StagedShard staged;
  if (pieces.size() == 1 && pieces[0].dtype == dtype) {  // its PieceWriter has measured it
    const PieceResult& result = pieces[0].result;
    staged = {result.digest, result.sums.sum_squares, result.sums.nonfinite_count, false};
  } else {
    staged = ReducePieces(shard_, pieces, dtype, whole->data());
  }
  MutexLock lock(&mutex_);
  if (dropped_) return AttemptDropped(shard_);
  return *(result_ = staged);
}

absl::StatusOr<StagedShard> GradientStage::SumSeveral(const std::vector<GradientPiece>& pieces) {
  auto sum = room_->Allocate(shard_.count() * sizeof(float));
  if (!sum.ok()) return Annotated(sum.status(), shard_.Name());
  const auto staged = SumPieces(shard_, pieces, (*sum)->as<float>());
  if (!staged.ok()) return staged.status();
  MutexLock lock(&mutex_);
  if (dropped_) return AttemptDropped(shard_);
  for (GradientPiece& piece : pieces_) piece.bytes.reset();
  whole_ = *std::move(sum);
  dtype_ = v1::DTYPE_F32;
  return *(result_ = *staged);
}

absl::StatusOr<StagedGradient> GradientStage::Gradient() const {
  MutexLock lock(&mutex_);
  if (!HasPieces()) return AbsentGradient(shard_);
  if (!result_)
    return ShardError(absl::StatusCode::kFailedPrecondition, shard_, "no gradient is staged");
  if (result_->absent) return AbsentGradient(shard_);
  return StagedGradient{whole_, false, {KernelDType(dtype_), whole_->data(), shard_.count()}};
}

void GradientStage::Drop() {
  MutexLock lock(&mutex_);
  dropped_ = true;
}

// ---- What can be seen ----

bool GradientStage::has_begun() const {
  MutexLock lock(&mutex_);
  return std::ranges::any_of(pieces_, [](const GradientPiece& p) { return p.claimed || p.stored; });
}

std::string GradientStage::Description() const {
  MutexLock lock(&mutex_);
  if (result_) return "staged";
  return absl::StrCat("staging ", std::ranges::count_if(pieces_, &GradientPiece::stored), " of ",
                      pieces_.size(), " pieces");
}

GradientImage GradientStage::Image() const {
  MutexLock lock(&mutex_);
  return {dtype_, whole_, result_, pieces_};
}

// Checks that every buffer from which Sum and Gradient will read has the size that they rely on.
absl::Status GradientStage::CheckBytes(const GradientImage& image) const {
  const bool has_pieces = std::ranges::any_of(image.pieces, &GradientPiece::stored);
  const bool is_summed = image.result && !image.result->absent;
  bool is_right =
      !has_pieces || !(direct_ || is_summed) || Holds(image.whole, image.dtype, shard_.count());
  for (const GradientPiece& piece : image.pieces)
    if (piece.stored && !direct_ && !image.result)
      is_right = is_right && Holds(piece.bytes, StagedDType(piece.dtype), piece.part.count());
  if (is_right) return absl::OkStatus();
  return ShardError(absl::StatusCode::kFailedPrecondition, shard_,
                    "staged gradients are missing, or of another size or dtype");
}

absl::Status GradientStage::Install(GradientImage image) {
  MutexLock lock(&mutex_);
  if (image.pieces.size() != pieces_.size())
    return ShardError(absl::StatusCode::kFailedPrecondition, shard_,
                      absl::StrCat(image.pieces.size(), " pieces were staged; the layout expects ",
                                   pieces_.size()));
  for (size_t i = 0; i < pieces_.size(); ++i) {
    GradientPiece& staged = image.pieces[i];
    if (pieces_[i].expected.rank != staged.expected.rank ||
        pieces_[i].expected.region != staged.expected.region)
      return ShardError(absl::StatusCode::kFailedPrecondition, shard_,
                        "pieces of another contribution layout were staged");
    staged.expected = pieces_[i].expected;
    staged.part = pieces_[i].part;
  }
  if (absl::Status status = CheckBytes(image); !status.ok()) return status;
  pieces_ = std::move(image.pieces);
  dtype_ = image.dtype;
  whole_ = std::move(image.whole);
  result_ = image.result;
  return absl::OkStatus();
}

}  // namespace orlop::server
