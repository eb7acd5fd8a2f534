// Tests that a copy of a shard, made by images, steps to the same bits as the shard.
#include "server/shards/shard_image.h"

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#include "absl/status/status.h"
#include "orlop/v1/types.pb.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/gradient_stage.h"
#include "server/shards/gradient_sum.h"
#include "server/shards/load_stage.h"
#include "server/shards/shard_store.h"
#include "server/shards/shard_update.h"
#include "server/shards/staged.h"
#include "server/shards/testing/shard_fixture.h"

namespace orlop::server {
namespace {

BufferPtr CopyOf(ShardImage* to, const BufferPtr& bytes) {
  if (!bytes) return nullptr;
  BufferPtr copy = to->NewStaged(bytes->size()).value();
  std::memcpy(copy->data(), bytes->data(), bytes->size());
  return copy;
}

void CopySlots(const ShardImage& from, ShardImage* to) {
  to->set_version(from.version());
  for (size_t i = 0; i < kStoredSlotCount; ++i) {
    const Slot slot = static_cast<Slot>(i);
    const BufferPtr bytes = from.ReadSlot(slot).value();
    if (!bytes) {
      to->ClearSlot(slot);
      continue;
    }
    BufferPtr copy = to->NewSlot(slot).value();
    std::memcpy(copy->data(), bytes->data(), bytes->size());
    ASSERT_TRUE(to->KeepSlot(slot, std::move(copy)).ok());
  }
}

void CopyStaged(const ShardImage& from, ShardImage* to) {
  if (auto gradient = from.ReadGradient()) {
    gradient->whole = CopyOf(to, gradient->whole);
    for (GradientPiece& piece : gradient->pieces) piece.bytes = CopyOf(to, piece.bytes);
    ASSERT_TRUE(to->InstallGradient(*std::move(gradient)).ok());
  }
  if (auto load = from.ReadLoad()) {
    std::array<BufferPtr, kStoredSlotCount> planes;
    for (size_t i = 0; i < kStoredSlotCount; ++i)
      planes[i] = CopyOf(to, from.ReadPlane(static_cast<Slot>(i)).value());
    ASSERT_TRUE(to->InstallLoad(*std::move(load), std::move(planes)).ok());
  }
}

void CopyAll(ShardStore* from, ShardStore* to) {
  to->BeginRestore();
  for (const OwnedShard& shard : from->layout().shards) {
    const auto source = from->Image(shard.id).value(), copy = to->Image(shard.id).value();
    CopySlots(*source, copy.get());
    CopyStaged(*source, copy.get());
  }
}

// Copies shards from a store that spills slots to one that does not, and back.
TEST(ShardImage, ACopyStepsAsTheShardDoes) {
  const OwnedShards layout = Layout({Parameter("w", {300, 1000})}, 25'600);
  World small(7 * kMiB / 4, 64 * kMiB), large;
  auto from = NewStore(&small, layout), to = NewStore(&large, layout);
  for (ShardStore* each : {from.get(), to.get()}) {
    ASSERT_TRUE(each->Configure(AllAdamW(layout)).ok());
    ASSERT_TRUE(each->SetLayout(WholeLayout(layout)).ok());
  }
  LoadTensor(from.get(), 0, Normal(300'000, 1));
  CommitLoad(from.get(), 0);
  AdamWStep(from.get(), 1, 3);
  ASSERT_GT(small.accountant.used_bytes(Tier::kNvme), 0u);
  PushTensor(from.get(), 0, 0, Normal(300'000, 4));
  CopyAll(from.get(), to.get());
  for (ShardStore* each : {from.get(), to.get()})
    for (const OwnedShard& shard : layout.shards) {
      ASSERT_TRUE(StageGradient(each, shard.id).ok());
      ASSERT_TRUE(each->Apply(shard.id, {ShardUpdate::Kind::kApply, 2, false, AdamW(1)}).ok());
    }
  EXPECT_EQ(AllBytes(to.get(), 2), AllBytes(from.get(), 2));

  LoadTensor(to.get(), 0, Normal(300'000, 5));
  CopyAll(to.get(), from.get());
  CommitLoad(to.get(), 3);
  CommitLoad(from.get(), 3);
  EXPECT_EQ(AllBytes(from.get(), 3), AllBytes(to.get(), 3));
}

// As after a restart: the copy has no room for the tensor, which a LOAD has set in the original.
TEST(ShardImage, ACopyGetsRoomForWhatWasUnset) {
  Tensor base = Parameter("base", {64, 100});
  base.may_be_unset = true;
  const OwnedShards layout = Layout({Parameter("w", {64, 100}), base}, 25'600);
  const auto frozen = [&] {
    auto optimizers = AllAdamW(layout);
    optimizers[1] = {};
    return optimizers;
  };
  World one, other;
  auto from = NewStore(&one, layout), to = NewStore(&other, layout);
  for (ShardStore* each : {from.get(), to.get()}) ASSERT_TRUE(each->Configure(frozen()).ok());
  LoadTensor(from.get(), 0, Normal(6400, 1));
  CommitLoad(from.get(), 0);
  CopyAll(from.get(), to.get());
  EXPECT_EQ(RestBytes(to.get(), 1), 0u);
  LoadTensor(from.get(), 1, Normal(6400, 2));
  CommitLoad(from.get(), 1);
  CopyAll(from.get(), to.get());
  EXPECT_EQ(AllBytes(to.get(), 1), AllBytes(from.get(), 1));
  EXPECT_EQ(RestBytes(to.get(), 1), 6400u * 4);
  ASSERT_TRUE(to->Configure(AllAdamW(layout)).ok());
  ASSERT_TRUE(to->SetLayout(WholeLayout(layout)).ok());
  AdamWStep(to.get(), 2, 5);
}

TEST(ShardImage, RefusesPiecesOfAnotherLayout) {
  World world;
  const OwnedShards layout = Layout({Parameter("w", {300})}, 1 << 20);
  auto store = NewStore(&world, layout);
  ASSERT_TRUE(store->SetLayout(WholeLayout(layout, 2)).ok());
  PushTensor(store.get(), 0, 1, Normal(300, 1));
  auto gradient = store->Image(0).value()->ReadGradient().value();
  ASSERT_TRUE(store->SetLayout(WholeLayout(layout)).ok());
  EXPECT_TRUE(
      absl::IsFailedPrecondition(store->Image(0).value()->InstallGradient(std::move(gradient))));
  EXPECT_TRUE(absl::IsNotFound(store->Image(1).status()));
}

TEST(ShardImage, RefusesGradientsOfAnotherSizeOrDType) {
  World world;
  const OwnedShards layout = Layout({Parameter("w", {300})}, 1 << 20);
  for (const uint32_t ranks : {1u, 2u}) {  // in the shard's buffer, and in a buffer for each rank
    auto store = NewStore(&world, layout);
    ASSERT_TRUE(store->SetLayout(WholeLayout(layout, ranks)).ok());
    PushTensor(store.get(), 0, 0, Normal(300, 1));
    const auto image = store->Image(0).value();
    const auto refused = [&](const std::function<void(GradientImage*)>& change) {
      GradientImage gradient = image->ReadGradient().value();
      change(&gradient);
      return absl::IsFailedPrecondition(image->InstallGradient(std::move(gradient)));
    };
    EXPECT_FALSE(refused([](GradientImage*) {}));
    const auto bytes = [&](GradientImage* gradient) -> BufferPtr& {
      return ranks == 1 ? gradient->whole : gradient->pieces[0].bytes;
    };
    EXPECT_TRUE(refused([&](GradientImage* gradient) { bytes(gradient) = nullptr; }));
    EXPECT_TRUE(refused(
        [&](GradientImage* gradient) { bytes(gradient) = image->NewStaged(1000).value(); }));
    EXPECT_TRUE(refused([&](GradientImage* gradient) {
      gradient->dtype = gradient->pieces[0].dtype = v1::DTYPE_I64;
    }));
    EXPECT_TRUE(refused([](GradientImage* gradient) {  // a sum that is not there
      gradient->result = StagedShard();
      gradient->whole = nullptr;
    }));
  }
}

TEST(ShardImage, RefusesLoadsThatDoNotFitTheSlots) {
  World world;
  const OwnedShards layout = Layout({Parameter("w", {300})}, 1 << 20);
  auto store = NewStore(&world, layout);
  LoadTensor(store.get(), 0, Normal(300, 1));
  const auto image = store->Image(0).value();
  const auto refused = [&](const std::function<void(LoadPiece*)>& change,
                           const BufferPtr& plane = nullptr) {
    LoadImage load = image->ReadLoad().value();
    change(&load.pieces.front());
    std::array<BufferPtr, kStoredSlotCount> planes;
    planes[0] = plane;
    return absl::IsFailedPrecondition(image->InstallLoad(std::move(load), std::move(planes)));
  };
  const auto as_it_is = [](LoadPiece*) {};
  EXPECT_FALSE(refused(as_it_is));
  EXPECT_FALSE(refused(as_it_is, image->NewStaged(600).value()));
  EXPECT_TRUE(refused(as_it_is, image->NewStaged(602).value()));
  EXPECT_TRUE(refused([](LoadPiece* piece) { piece->slot = static_cast<Slot>(kStoredSlotCount); }));
  EXPECT_TRUE(refused([](LoadPiece* piece) { piece->slot = Slot::kExpAvg; }));  // not configured
  EXPECT_TRUE(refused([](LoadPiece* piece) { piece->dtype = v1::DTYPE_U8; }));
  EXPECT_TRUE(refused([](LoadPiece* piece) { piece->box = {{0, 0}, {1}, false}; }));
  EXPECT_TRUE(refused([](LoadPiece* piece) { piece->box = Flat(200, 200); }));
}

}  // namespace
}  // namespace orlop::server
