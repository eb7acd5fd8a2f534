// Tests the staging of SetState.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "base/checksum.h"
#include "kernels/optimizer.h"
#include "kernels/quantize.h"
#include "orlop/v1/types.pb.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/piece_writer.h"
#include "server/shards/shard_store.h"
#include "server/shards/shard_update.h"
#include "server/shards/testing/shard_fixture.h"

namespace orlop::server {
namespace {

using testing::HasSubstr;

TEST(Load, FirstMustCoverEveryWeightByName) {
  World world;
  auto store =
      NewStore(&world, Layout({Parameter("a", {100}), Parameter("layer.b", {50, 20})}, 1 << 20));
  LoadTensor(store.get(), 0, Normal(100, 1));
  ASSERT_TRUE(Send(store->BeginLoad(1, Slot::kWeight, v1::DTYPE_F32, Rectangle({0, 0}, {50, 19})),
                   AsBytes(Normal(950, 2)))
                  .ok());
  EXPECT_TRUE(StageLoad(store, 0).ok());
  const absl::Status partial = StageLoad(store, 1).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(partial));
  EXPECT_THAT(std::string(partial.message()), HasSubstr("layer.b"));
  EXPECT_TRUE(absl::IsAlreadyExists(
      store->BeginLoad(1, Slot::kMaster, v1::DTYPE_F32, Flat(18, 1)).status()));
  ASSERT_TRUE(Send(store->BeginLoad(1, Slot::kWeight, v1::DTYPE_F32, Rectangle({0, 19}, {50, 1})),
                   AsBytes(Normal(50, 3)))
                  .ok());
  CommitLoad(store.get(), 0);
  EXPECT_EQ(store->version(1).value(), 0);
}

TEST(Load, KeepsTheExactMasterAndWhatItDoesNotSet) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {64, 100})}, 2560));
  auto values = Normal(6400, 1);
  LoadTensor(store.get(), 0, values);
  CommitLoad(store.get(), 0);
  const Box edit = Rectangle({10, 30}, {50, 7});
  const auto fresh = Normal(350, 2);
  size_t used = 0;
  for (const OwnedShard& shard : store->layout().shards) {
    std::vector<float> part;
    ForEachRun(edit, {64, 100}, shard.range, [&](Range run) {
      for (uint64_t i = run.begin; i < run.end; ++i) part.push_back(values[i] = fresh[used++]);
    });
    if (part.empty()) continue;
    ASSERT_TRUE(
        Send(store->BeginLoad(shard.id, Slot::kMaster, v1::DTYPE_F32, edit), AsBytes(part)).ok());
  }
  ASSERT_EQ(used, fresh.size());
  CommitLoad(store.get(), 1);
  std::vector<float> read;
  for (const OwnedShard& shard : store->layout().shards) {
    const auto part = FromBytes<float>(
        Read(store.get(), {shard.id, Slot::kMaster, v1::DTYPE_F32, WholeTensor(6400), 1}));
    read.insert(read.end(), part.begin(), part.end());
  }
  EXPECT_EQ(AsBytes(read), AsBytes(values));
}

TEST(Load, QuantisesMomentsAndReadsThemBack) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {64, 100})}, 2560));
  ASSERT_TRUE(store->Configure(AllAdamW(store->layout())).ok());
  const auto values = Normal(6400, 1), moment = Normal(6400, 2, 1e-3f);
  LoadTensor(store.get(), 0, values);
  LoadTensor(store.get(), 0, moment, Slot::kExpAvg);
  CommitLoad(store.get(), 0);
  std::vector<uint8_t> codes(6400);
  std::vector<float> absmax(25), decoded(6400);
  ASSERT_TRUE(kernels::QuantizeBlocks(kernels::CodeBook::kSigned, kernels::Rounding::kNearest,
                                      moment, absl::MakeSpan(codes), absl::MakeSpan(absmax))
                  .ok());
  ASSERT_TRUE(
      kernels::DequantizeBlocks(kernels::CodeBook::kSigned, codes, absmax, absl::MakeSpan(decoded))
          .ok());
  for (const OwnedShard& shard : store->layout().shards) {
    const Range r = shard.range;
    EXPECT_EQ(Read(store.get(), {shard.id, Slot::kExpAvg, v1::DTYPE_U8, WholeTensor(6400), 0}),
              std::vector<uint8_t>(codes.begin() + r.begin, codes.begin() + r.end));
    EXPECT_EQ(FromBytes<float>(Read(
                  store.get(), {shard.id, Slot::kExpAvg, v1::DTYPE_F32, WholeTensor(6400), 0})),
              std::vector<float>(decoded.begin() + r.begin, decoded.begin() + r.end));
    EXPECT_EQ(FromBytes<float>(Read(store.get(), {shard.id, Slot::kExpAvgAbsmax, v1::DTYPE_F32,
                                                  WholeTensor(6400), 0})),
              std::vector<float>(absmax.begin() + r.begin / 256, absmax.begin() + r.end / 256));
    EXPECT_EQ(FromBytes<float>(Read(
                  store.get(), {shard.id, Slot::kExpAvgSq, v1::DTYPE_F32, WholeTensor(6400), 0})),
              std::vector<float>(r.count(), 0.0f));
  }
  EXPECT_TRUE(absl::IsInvalidArgument(
      store->BeginLoad(0, Slot::kExpAvg, v1::DTYPE_F32, Flat(1, 256)).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      store->BeginLoad(0, Slot::kMomentumBuffer, v1::DTYPE_F32, Flat(0, 256)).status()));
}

TEST(Load, QuantisesFp32IntoFourBits) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {64, 100})}, 2560));
  auto optimizers = AllAdamW(store->layout());
  optimizers[0].state = kernels::StateFormat::k4Bit;
  ASSERT_TRUE(store->Configure(optimizers).ok());
  const auto moment = Normal(6400, 2, 1e-3f);
  LoadTensor(store.get(), 0, Normal(6400, 1));
  LoadTensor(store.get(), 0, moment, Slot::kExpAvg);
  CommitLoad(store.get(), 0);
  std::vector<uint8_t> codes(3200);
  std::vector<float> absmax(50), decoded(6400);
  ASSERT_TRUE(kernels::RequantizeBlocks4(kernels::CodeBook::kSigned, kernels::Rounding::kNoZero,
                                         moment, absl::MakeSpan(codes), absl::MakeSpan(absmax))
                  .ok());
  ASSERT_TRUE(
      kernels::DequantizeBlocks4(kernels::CodeBook::kSigned, codes, absmax, absl::MakeSpan(decoded))
          .ok());
  for (const OwnedShard& shard : store->layout().shards) {
    const Range r = shard.range;
    EXPECT_EQ(FromBytes<float>(Read(
                  store.get(), {shard.id, Slot::kExpAvg, v1::DTYPE_F32, WholeTensor(6400), 0})),
              std::vector<float>(decoded.begin() + r.begin, decoded.begin() + r.end));
  }
}

TEST(Load, AnotherRankMayRepeatABoxButNotChangeIt) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {512})}, 1 << 20));
  const auto values = AsBytes(Normal(512, 1));
  ASSERT_TRUE(Send(store->BeginLoad(0, Slot::kWeight, v1::DTYPE_F32, Flat(0, 512)), values).ok());
  EXPECT_TRUE(Send(store->BeginLoad(0, Slot::kWeight, v1::DTYPE_F32, Flat(0, 512)), values).ok());
  EXPECT_TRUE(absl::IsAlreadyExists(Send(
      store->BeginLoad(0, Slot::kWeight, v1::DTYPE_F32, Flat(0, 512)), AsBytes(Normal(512, 2)))));
  CommitLoad(store.get(), 0);
  EXPECT_EQ(Read(store.get(), {0, Slot::kMaster, v1::DTYPE_F32, Flat(0, 512), 0}), values);
}

TEST(Load, AStreamLeftOpenWritesNothingIntoWhatIsCommitted) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {512})}, 1 << 20));
  LoadTensor(store.get(), 0, Normal(512, 1));
  CommitLoad(store.get(), 0);
  const auto half = AsBytes(Normal(256, 2));
  ASSERT_TRUE(Send(store->BeginLoad(0, Slot::kWeight, v1::DTYPE_F32, Flat(0, 256)), half).ok());
  auto open = store->BeginLoad(0, Slot::kWeight, v1::DTYPE_F32, Flat(256, 256)).value();
  CommitLoad(store.get(), 1);
  const auto before = AllBytes(store.get(), 1);
  EXPECT_TRUE(absl::IsAborted(Send(open.get(), AsBytes(Normal(256, 3)))));
  EXPECT_EQ(AllBytes(store.get(), 1), before);
}

// Begins a piece of 2 MiB, writes half of it, and gives it up, as a stream does whose piece is
// refused.
void Refuse(absl::StatusOr<std::unique_ptr<PieceWriter>> writer,
            const std::vector<uint8_t>& bytes) {
  ASSERT_TRUE(writer.ok()) << writer.status();
  const absl::Span<const uint8_t> slices[] = {{bytes.data(), bytes.size() / 2}};
  const std::string_view half(reinterpret_cast<const char*>(bytes.data()), bytes.size() / 2);
  ASSERT_TRUE((*writer)->WriteChunk(0, slices, ChunkChecksum(LeafHashes(half))).ok());
  EXPECT_FALSE((*writer)->Finish(DigestOfBytes(bytes)).ok());
  EXPECT_FALSE((*writer)->Keep().ok());
}

// A LOAD sets what was acknowledged. Whatever a refused piece has written, it neither changes a
// slot nor stops the step.
TEST(Load, ARefusedPieceSetsNothing) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {1 << 19})}, 1 << 19));
  ASSERT_TRUE(store->Configure(AllAdamW(store->layout())).ok());
  LoadTensor(store.get(), 0, Normal(1 << 19, 1));
  CommitLoad(store.get(), 0);
  const auto before = AllBytes(store.get(), 0);
  const auto whole = Flat(0, 1 << 19);
  for (Slot slot : {Slot::kWeight, Slot::kExpAvg, Slot::kExpAvgSq})
    Refuse(store->BeginLoad(0, slot, v1::DTYPE_F32, whole), AsBytes(Normal(1 << 19, 2)));
  // The step machine stages no shard without pieces.
  ASSERT_TRUE(store->Apply(0, {ShardUpdate::Kind::kLoad, 1}).ok());
  EXPECT_EQ(AllBytes(store.get(), 1), before);
  Refuse(store->BeginLoad(0, Slot::kExpAvg, v1::DTYPE_F32, whole), AsBytes(Normal(1 << 19, 2)));
  EXPECT_TRUE(StageLoad(store, 0).value().absent);
  ASSERT_TRUE(store->Apply(0, {ShardUpdate::Kind::kLoad, 2}).ok());
  EXPECT_EQ(AllBytes(store.get(), 2), before);
  // A stream that began before the decision and is still open when the step is applied.
  auto open = store->BeginLoad(0, Slot::kExpAvg, v1::DTYPE_F32, whole).value();
  ASSERT_TRUE(store->Apply(0, {ShardUpdate::Kind::kLoad, 3}).ok());
  EXPECT_TRUE(absl::IsAborted(Send(open.get(), AsBytes(Normal(1 << 19, 2)))));
  EXPECT_EQ(AllBytes(store.get(), 3), before);
}

TEST(Load, ARefusedPieceBesideAnotherSetsNothing) {
  World world;
  const auto values = Normal(1 << 19, 1);
  auto bf16 = FromBytes<uint16_t>(AsBytes(values));  // any bits
  for (size_t i = 0; i < bf16.size() / 2; ++i) bf16[i] = bf16[2 * i + 1];
  bf16.resize(values.size());
  const auto whole = Flat(0, 1 << 19);
  std::vector<uint8_t> results[2];
  for (const bool refused : {false, true}) {
    auto store = NewStore(&world, Layout({Parameter("w", {1 << 19})}, 1 << 19));
    ASSERT_TRUE(store->Configure(AllAdamW(store->layout())).ok());
    if (refused) {
      // It begins a plane for the remainder, which is zero if only bf16 weights are set.
      Refuse(store->BeginLoad(0, Slot::kWeight, v1::DTYPE_F32, whole), AsBytes(values));
      Refuse(store->BeginLoad(0, Slot::kExpAvg, v1::DTYPE_F32, whole), AsBytes(values));
    }
    ASSERT_TRUE(
        Send(store->BeginLoad(0, Slot::kWeight, v1::DTYPE_BF16, whole), AsBytes(bf16)).ok());
    CommitLoad(store.get(), 0);
    results[refused] = AllBytes(store.get(), 0);
  }
  EXPECT_EQ(results[1], results[0]);
}

// The planes of a refused piece are of the formats of before.
TEST(Load, AnotherConfigurationForgetsRefusedPieces) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {1 << 19})}, 1 << 19));
  auto wanted = AllAdamW(store->layout());
  ASSERT_TRUE(store->Configure(wanted).ok());
  LoadTensor(store.get(), 0, Normal(1 << 19, 1));
  const auto moment = AsBytes(Normal(1 << 19, 2));
  Refuse(store->BeginLoad(0, Slot::kExpAvg, v1::DTYPE_F32, Flat(0, 1 << 19)), moment);
  CommitLoad(store.get(), 0);
  Refuse(store->BeginLoad(0, Slot::kExpAvg, v1::DTYPE_F32, Flat(0, 1 << 19)), moment);
  wanted[0].state = kernels::StateFormat::kFp32;
  ASSERT_TRUE(store->Configure(wanted).ok());
  ASSERT_TRUE(
      Send(store->BeginLoad(0, Slot::kExpAvg, v1::DTYPE_F32, Flat(0, 1 << 19)), moment).ok());
  CommitLoad(store.get(), 1);
  EXPECT_EQ(Read(store.get(), {0, Slot::kExpAvg, v1::DTYPE_F32, Flat(0, 1 << 19), 1}), moment);
}

TEST(Load, AnotherConfigurationWaitsForNothingStaged) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {64, 100})}, 2560));
  auto wanted = AllAdamW(store->layout());
  ASSERT_TRUE(store->Configure(wanted).ok());
  LoadTensor(store.get(), 0, Normal(6400, 1));
  auto open = store->BeginLoad(0, Slot::kExpAvg, v1::DTYPE_F32, Flat(0, 2560)).value();
  EXPECT_TRUE(store->Configure(wanted).ok());  // the present configuration
  wanted[0].state = wanted[0].state == kernels::StateFormat::kFp32 ? kernels::StateFormat::k8Bit
                                                                   : kernels::StateFormat::kFp32;
  EXPECT_TRUE(absl::IsFailedPrecondition(store->Configure(wanted)));
  ASSERT_TRUE(Send(open.get(), AsBytes(Normal(2560, 2))).ok());
  CommitLoad(store.get(), 0);
  EXPECT_TRUE(store->Configure(wanted).ok());
}

// Reads go on during a change of configuration. A LOAD is refused during the change, and the change
// is refused while a LOAD is staged.
TEST(Load, ConfiguresBesideReadsAndLoads) {
  World world;
  const OwnedShards layout = Layout({Parameter("w", {64, 100})}, 2560);
  auto store = NewStore(&world, layout);
  LoadTensor(store.get(), 0, Normal(6400, 1));
  CommitLoad(store.get(), 0);
  std::atomic<bool> done = false;
  std::thread beside([&] {
    while (!done)
      for (const OwnedShard& shard : layout.shards) {
        EXPECT_TRUE(
            store->OpenRead({shard.id, Slot::kMaster, v1::DTYPE_F32, Flat(0, 6400), 0}).ok());
        const auto writer = store->BeginLoad(shard.id, Slot::kExpAvg, v1::DTYPE_F32, Flat(0, 6400));
        EXPECT_TRUE(writer.ok() || absl::IsUnavailable(writer.status()) ||
                    absl::IsInvalidArgument(writer.status()))
            << writer.status();
        if (writer.ok()) store->DropStaged();
      }
  });
  auto wanted = AllAdamW(layout);
  for (int round = 0; round < 100; ++round) {
    wanted[0].state = round % 2 == 0 ? kernels::StateFormat::k8Bit : kernels::StateFormat::kFp32;
    const absl::Status configured = store->Configure(wanted);
    EXPECT_TRUE(configured.ok() || absl::IsFailedPrecondition(configured)) << configured;
  }
  done = true;
  beside.join();
  store->DropStaged();
  EXPECT_TRUE(store->Configure(AllAdamW(layout)).ok());
  EXPECT_EQ(Read(store.get(), {0, Slot::kExpAvg, v1::DTYPE_F32, Flat(0, 2560), 0}),
            std::vector<uint8_t>(2560 * sizeof(float)));
}

TEST(Load, ARefusedConfigurationKeepsLoadedMoments) {
  World world(2 * kMiB);
  auto store = NewStore(&world, Layout({Parameter("w", {64, 1600})}, 25600));
  auto small = AllAdamW(store->layout());
  small[0].state = kernels::StateFormat::k8Bit;
  ASSERT_TRUE(store->Configure(small).ok());
  LoadTensor(store.get(), 0, Normal(102400, 1));
  LoadTensor(store.get(), 0, Normal(102400, 2, 1e-3f), Slot::kExpAvg);
  CommitLoad(store.get(), 0);
  const auto before = AllBytes(store.get(), 0);
  auto large = small;
  large[0].state = kernels::StateFormat::kFp32;
  auto filler = world.accountant.Reserve({Tier::kDram, "other", "state"}, kMiB);
  ASSERT_TRUE(filler.ok()) << filler.status();
  EXPECT_TRUE(absl::IsResourceExhausted(store->Configure(large)));
  EXPECT_EQ(AllBytes(store.get(), 0), before);
  filler = Reservation();
  auto rounding = small;
  rounding[0].rounding = kernels::Rounding::kNearest;
  EXPECT_TRUE(store->Configure(rounding).ok());
  EXPECT_EQ(AllBytes(store.get(), 0), before);
}

// ---- A plane on its way to disk ----

// A job whose second moments are on disk, and one LOAD piece that sets all of shard 0's second
// moment.
struct Moving {
  Moving() : world(7 * kMiB, 64 * kMiB) {
    const OwnedShards layout = Layout({Parameter("w", {1024, 1024})}, 1 << 18);
    store = NewStore(&world, layout);
    EXPECT_TRUE(store->Configure(AllAdamW(layout)).ok());
    EXPECT_TRUE(store->SetLayout(WholeLayout(layout)).ok());
    LoadTensor(store.get(), 0, Normal(1 << 20, 1));
    CommitLoad(store.get(), 0);
    const ShardStatus shard = store->Describe(0).value();
    for (const SlotStatus& slot : shard.slots)
      if (slot.slot == Slot::kExpAvgSq) {
        EXPECT_EQ(slot.tier, Tier::kNvme) << "nothing is on disk: the tests show nothing";
      }
    values_before = world.disk.ScanBulk("spill/").value().size();
    writer = Kept();
  }
  ~Moving() {
    world.disk.Heal();
    if (settling.joinable()) settling.join();
  }
  // Sends the piece and keeps it. The disk hangs from then on.
  std::unique_ptr<PieceWriter> Kept() {
    auto writer = store->BeginLoad(0, Slot::kExpAvgSq, v1::DTYPE_F32, Flat(0, 1 << 18)).value();
    const auto bytes = AsBytes(Positive());
    const absl::Span<const uint8_t> slices[] = {bytes};
    const uint64_t checksum =
        ChunkChecksum(LeafHashes({reinterpret_cast<const char*>(bytes.data()), bytes.size()}));
    EXPECT_TRUE(writer->WriteChunk(0, slices, checksum).ok());
    EXPECT_TRUE(writer->Finish(DigestOfBytes(bytes)).ok());
    world.disk.HangWrites();
    EXPECT_TRUE(writer->Keep().ok());  // Keep does not use the disk
    return writer;
  }
  // Settles the piece in a thread, and waits until the disk hangs in that call.
  void Settle() {
    settling = std::thread([this] { writer->Settle(); });
    world.disk.AwaitHangingWrite();
  }
  static std::vector<float> Positive() {
    std::vector<float> values = Normal(1 << 18, 5);
    for (float& value : values) value *= value;
    return values;
  }

  World world;
  std::unique_ptr<ShardStore> store;
  size_t values_before = 0;
  std::unique_ptr<PieceWriter> writer;
  std::thread settling;
};

// The second moment and its digest by StageLoad, if the plane does not move to disk.
struct Expected {
  Expected() : digest(StageLoad(moving.store, 0).value().digest) {
    moving.world.disk.Heal();
    EXPECT_TRUE(moving.store->Apply(0, {ShardUpdate::Kind::kLoad, 1}).ok());
    bytes =
        Read(moving.store.get(), {0, Slot::kExpAvgSq, v1::DTYPE_UNSPECIFIED, Flat(0, 1 << 20), 1});
  }
  Moving moving;
  Digest128 digest;
  std::vector<uint8_t> bytes;
};

TEST(Load, KeepAndDropWaitForNoDisk) {
  Moving moving;
  EXPECT_EQ(moving.store->StagedLoads(0).value().size(), 1u);
  moving.Settle();
  EXPECT_EQ(moving.store->Describe(0).value().stage, "staging 1 pieces of state");
  EXPECT_EQ(moving.store->StagedLoads(0).value().size(), 1u);
  moving.store->DropStaged();
  EXPECT_EQ(moving.store->Describe(0).value().stage, "idle");
  moving.world.disk.Heal();
  moving.settling.join();
  moving.writer.reset();
  // Settle wrote the codes and discarded them, and did not write their absmax. The next write
  // erases the codes.
  EXPECT_EQ(moving.world.disk.ScanBulk("spill/").value().size(), moving.values_before + 1);
  moving.writer = moving.Kept();
  moving.world.disk.Heal();
  moving.writer->Settle();  // writes codes and absmax
  EXPECT_EQ(moving.world.disk.ScanBulk("spill/").value().size(), moving.values_before + 2);
}

TEST(Load, APlaneIsTheSameBeforeWhileAndAfterItMoves) {
  const Expected expected;
  {
    Moving moving;
    moving.Settle();
    EXPECT_EQ(StageLoad(moving.store, 0).value().digest, expected.digest);
    std::thread apply([&] {  // waits for the disk
      EXPECT_TRUE(moving.store->Apply(0, {ShardUpdate::Kind::kLoad, 1}).ok());
    });
    moving.world.disk.Heal();
    apply.join();
    EXPECT_EQ(
        Read(moving.store.get(), {0, Slot::kExpAvgSq, v1::DTYPE_UNSPECIFIED, Flat(0, 1 << 20), 1}),
        expected.bytes);
  }
  Moving moving;
  moving.world.disk.Heal();
  const uint64_t used = moving.world.accountant.used_bytes(Tier::kDram);
  moving.writer->Settle();
  EXPECT_LT(moving.world.accountant.used_bytes(Tier::kDram), used);
  EXPECT_EQ(StageLoad(moving.store, 0).value().digest, expected.digest);
  EXPECT_TRUE(moving.store->Apply(0, {ShardUpdate::Kind::kLoad, 1}).ok());
  EXPECT_EQ(
      Read(moving.store.get(), {0, Slot::kExpAvgSq, v1::DTYPE_UNSPECIFIED, Flat(0, 1 << 20), 1}),
      expected.bytes);
}

TEST(Load, BuffersKeepTheirDType) {
  World world;
  auto store = NewStore(&world, Layout({{"counter", false, {3}, v1::DTYPE_I64}}, 256));
  const auto bytes = AsBytes(std::vector<int64_t>{1, -2, int64_t{1} << 40});
  EXPECT_TRUE(absl::IsInvalidArgument(
      store->BeginLoad(0, Slot::kWeight, v1::DTYPE_F32, Flat(0, 3)).status()));
  ASSERT_TRUE(Send(store->BeginLoad(0, Slot::kWeight, v1::DTYPE_I64, Flat(0, 3)), bytes).ok());
  CommitLoad(store.get(), 0);
  EXPECT_EQ(Read(store.get(), {0, Slot::kWeight, v1::DTYPE_UNSPECIFIED, Flat(0, 3), 0}), bytes);
}

}  // namespace
}  // namespace orlop::server
