// Tests of ShardStore: applies and reads, memory budgets, and spilling of slots to disk. The
// helpers (World, Layout, LoadTensor, AdamWStep and others) are in testing/shard_fixture.h.
#include "server/shards/shard_store.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "base/checksum.h"
#include "kernels/casts.h"
#include "kernels/optimizer.h"
#include "kernels/quantize.h"
#include "kernels/types.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/shard_read.h"
#include "server/shards/shard_update.h"
#include "server/shards/testing/shard_fixture.h"

namespace orlop::server {
namespace {

using testing::HasSubstr;

// ---- Apply and reads ----

// Returns the bytes of a tensor's fp32 master after `steps` AdamW steps with 8-bit states from the
// values `start`. The kernels are called on the whole tensor, with no ShardStore. The gradient of
// step s is Normal(count, seed * s).
std::vector<uint8_t> ReferenceMaster(const std::vector<float>& start, uint64_t columns, int steps,
                                     uint32_t seed) {
  const size_t count = start.size();
  std::vector<uint16_t> weight(count);
  std::vector<int16_t> remainder(count);
  std::vector<uint8_t> m(count, kernels::kSignedZeroCode), v(count, kernels::kUnsignedZeroCode);
  std::vector<float> m_scale(kernels::BlockCount(count)), v_scale(kernels::BlockCount(count)),
      master(count);
  EXPECT_TRUE(kernels::SplitMaster(start, absl::MakeSpan(weight), absl::MakeSpan(remainder)).ok());
  for (int step = 1; step <= steps; ++step) {
    const auto gradient = Normal(count, seed * step);
    const kernels::StepScalars scalars = AdamW(step - 1);
    kernels::RangeStep range;
    range.optimizer = kernels::FindOptimizer("adamw");
    range.scalars = scalars.span();
    range.gradient = {kernels::DType::kF32, gradient.data(), count};
    range.weight = range.new_weight = weight.data();
    range.remainder = remainder.data();
    range.format = kernels::StateFormat::k8Bit;
    range.states[0] = {m.data(), m_scale.data()};
    range.states[1] = {v.data(), v_scale.data()};
    EXPECT_TRUE(kernels::Step(range).ok());
  }
  EXPECT_TRUE(kernels::JoinMaster(weight, remainder, absl::MakeSpan(master)).ok());
  return AsBytes(master);
}

// Makes four steps of one tensor, whose shards are dealt out to 1, 2 and 3 stores as to so many
// servers, and compares the weights with ReferenceMaster. Slots spill if they do not fit into
// `dram_bytes` and `nvme_bytes` is not 0.
void CheckApplyEqualsKernels(uint64_t dram_bytes, uint64_t nvme_bytes) {
  constexpr uint64_t kRows = 300, kColumns = 1000, kCount = kRows * kColumns;
  const auto start = Normal(kCount, 1, 0.02f);
  const auto expected = ReferenceMaster(start, kColumns, 4, 99);
  for (const int partitions : {1, 2, 3}) {
    const OwnedShards whole = Layout({Parameter("w", {kRows, kColumns})}, 25'600);
    std::vector<uint8_t> read(kCount * 4);
    for (int partition = 0; partition < partitions; ++partition) {
      World world(dram_bytes, nvme_bytes);
      OwnedShards layout = whole;
      std::erase_if(layout.shards,
                    [&](const OwnedShard& shard) { return shard.id % partitions != partition; });
      auto store = NewStore(&world, layout);
      ASSERT_TRUE(store->Configure(AllAdamW(layout)).ok());
      LoadTensor(store.get(), 0, start);
      CommitLoad(store.get(), 0);
      ASSERT_TRUE(store->SetLayout(WholeLayout(layout)).ok());
      for (int step = 1; step <= 4; ++step) AdamWStep(store.get(), step, 99 * step);
      for (const OwnedShard& shard : layout.shards) {
        const auto part =
            Read(store.get(), {shard.id, Slot::kWeight, v1::DTYPE_F32, WholeTensor(kCount), 4});
        std::copy(part.begin(), part.end(), read.begin() + shard.range.begin * 4);
      }
      EXPECT_LE(world.accountant.peak_bytes(Tier::kDram), dram_bytes);
      if (nvme_bytes > 0 && partitions == 1) {
        EXPECT_GT(world.accountant.used_bytes(Tier::kNvme), 0u)
            << "nothing spilled: the test shows nothing";
      }
    }
    EXPECT_EQ(read, expected) << partitions << " partitions";
  }
}

TEST(Apply, EqualsTheKernelsForAnyNumberOfServers) { CheckApplyEqualsKernels(64 * kMiB, 0); }

TEST(Apply, ReaderOfTheOldVersionIsUndisturbed) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {64, 100})}, 1 << 20));
  ASSERT_TRUE(store->Configure(AllAdamW(store->layout())).ok());
  LoadTensor(store.get(), 0, Normal(6400, 1));
  CommitLoad(store.get(), 0);
  ASSERT_TRUE(store->SetLayout(WholeLayout(store->layout())).ok());
  const ReadRequest request{0, Slot::kWeight, v1::DTYPE_BF16, WholeTensor(6400), 0};
  const auto before = Read(store.get(), request);
  auto reader = store->OpenRead(request).value();
  const ReadChunk chunk = reader->Next().value();
  auto master = store->OpenRead({0, Slot::kMaster, v1::DTYPE_F32, WholeTensor(6400), 0}).value();
  const auto exact = Read(store.get(), {0, Slot::kMaster, v1::DTYPE_F32, WholeTensor(6400), 0});
  AdamWStep(store.get(), 1, 5);
  EXPECT_EQ(std::vector<uint8_t>(chunk.bytes.begin(), chunk.bytes.end()), before);
  const ReadChunk late = master->Next().value();
  EXPECT_EQ(std::vector<uint8_t>(late.bytes.begin(), late.bytes.end()), exact);
  // Version 0 can no longer be opened, and version 2 does not exist yet.
  const absl::Status gone = store->OpenRead(request).status();
  EXPECT_TRUE(absl::IsOutOfRange(gone));
  EXPECT_EQ(DetailOf(gone).version(), 1);
  EXPECT_TRUE(absl::IsFailedPrecondition(
      store->OpenRead({0, Slot::kWeight, v1::DTYPE_BF16, WholeTensor(6400), 2}).status()));
  EXPECT_NE(Read(store.get(), {0, Slot::kWeight, v1::DTYPE_BF16, WholeTensor(6400), 1}), before);
}

TEST(Apply, SkipAndUntouchedChangeTheVersionAlone) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {64, 100})}, 1 << 20));
  ASSERT_TRUE(store->Configure(AllAdamW(store->layout())).ok());
  LoadTensor(store.get(), 0, Normal(6400, 1));
  CommitLoad(store.get(), 0);
  ASSERT_TRUE(store->SetLayout(WholeLayout(store->layout())).ok());
  AdamWStep(store.get(), 1, 3);
  const auto before = AllBytes(store.get(), 1);
  PushTensor(store.get(), 0, 0, Normal(6400, 4));
  ASSERT_TRUE(StageGradient(store, 0).ok());
  // The shard is at version 1, so the next step is 2.
  EXPECT_TRUE(absl::IsFailedPrecondition(store->Apply(0, {ShardUpdate::Kind::kSkip, 3})));
  ASSERT_TRUE(store->Apply(0, {ShardUpdate::Kind::kSkip, 2}).ok());
  ASSERT_TRUE(store->Apply(0, {ShardUpdate::Kind::kApply, 3, true}).ok());
  EXPECT_EQ(AllBytes(store.get(), 3), before);
  EXPECT_EQ(store->Describe(0).value().stage, "idle");
}

// Several threads push, apply, read and describe shards at once, with and without spilling. Every
// stored byte must equal that of the same two steps on one thread.
TEST(Apply, ThreadsChangeNoBit) {
  const OwnedShards layout = Layout({Parameter("w", {300, 1000})}, 25'600);
  std::vector<uint8_t> expected;
  for (const uint64_t dram_bytes : {64 * kMiB, 7 * kMiB / 4}) {
    World world(dram_bytes, 64 * kMiB);
    auto store = NewStore(&world, layout);
    ASSERT_TRUE(store->Configure(AllAdamW(layout)).ok());
    LoadTensor(store.get(), 0, Normal(300'000, 1));
    CommitLoad(store.get(), 0);
    ASSERT_TRUE(store->SetLayout(WholeLayout(layout)).ok());
    if (expected.empty()) {
      AdamWStep(store.get(), 1, 3);
      AdamWStep(store.get(), 2, 4);
      expected = AllBytes(store.get(), 2);
      store = NewStore(&world, layout);
      ASSERT_TRUE(store->Configure(AllAdamW(layout)).ok());
      LoadTensor(store.get(), 0, Normal(300'000, 1));
      CommitLoad(store.get(), 0);
      ASSERT_TRUE(store->SetLayout(WholeLayout(layout)).ok());
    }
    const std::vector<float> gradients[] = {Normal(300'000, 3), Normal(300'000, 4)};
    std::atomic<bool> done = false;
    std::thread looker([&] {
      while (!done)
        for (const OwnedShard& shard : layout.shards) {
          EXPECT_TRUE(store->Describe(shard.id).ok());
          auto reader = store->OpenRead({shard.id, Slot::kWeight, v1::DTYPE_BF16,
                                         WholeTensor(300'000), store->version(shard.id).value()});
          if (!reader.ok()) continue;  // an apply has replaced the version
          EXPECT_TRUE((*reader)->Next().ok());
        }
    });
    std::vector<std::thread> workers;
    workers.reserve(3);
    for (int worker = 0; worker < 3; ++worker)
      workers.emplace_back([&, worker] {
        for (int step = 1; step <= 2; ++step)
          for (const OwnedShard& shard : layout.shards) {
            if (shard.id % 3 != worker) continue;
            const std::vector<float>& gradient = gradients[step - 1];
            const std::vector<float> part(gradient.begin() + shard.range.begin,
                                          gradient.begin() + shard.range.end);
            EXPECT_TRUE(
                Send(store->BeginGradient(shard.id, 0, 0, v1::DTYPE_F32), AsBytes(part)).ok());
            EXPECT_TRUE(StageGradient(store, shard.id).ok());
            const absl::Status applied =
                store->Apply(shard.id, {ShardUpdate::Kind::kApply, step, false, AdamW(step - 1)});
            EXPECT_TRUE(applied.ok()) << applied;
          }
      });
    for (std::thread& worker : workers) worker.join();
    done = true;
    looker.join();
    EXPECT_EQ(AllBytes(store.get(), 2), expected);
  }
}

TEST(Reading, ServesBoxesDTypesAndNamesOverflow) {
  World world;
  constexpr uint64_t kRows = 600, kColumns = 1000;
  auto store =
      NewStore(&world, Layout({Parameter("w", {kRows, kColumns}), Parameter("big", {2})}, 1 << 20));
  const auto values = Normal(kRows * kColumns, 1);
  LoadTensor(store.get(), 0, values);
  LoadTensor(store.get(), 1, {1.0f, 70000.0f});
  CommitLoad(store.get(), 0);
  const Box box = Rectangle({17, 30}, {500, 900});
  std::vector<float> expected;
  ForEachRun(box, {kRows, kColumns}, {0, kRows * kColumns}, [&](Range run) {
    expected.insert(expected.end(), values.begin() + run.begin, values.begin() + run.end);
  });
  EXPECT_EQ(Read(store.get(), {0, Slot::kWeight, v1::DTYPE_F32, box, 0}), AsBytes(expected));
  // The manifest's dtype, in chunks of up to 4 MiB.
  EXPECT_EQ(Read(store.get(), {0, Slot::kWeight, v1::DTYPE_UNSPECIFIED, box, 0, 4 * kMiB}),
            AsBytes(expected));
  std::vector<uint16_t> half(expected.size());
  ASSERT_TRUE(kernels::RoundToF16(expected, absl::MakeSpan(half)).ok());
  EXPECT_EQ(Read(store.get(), {0, Slot::kWeight, v1::DTYPE_F16, box, 0}), AsBytes(half));
  auto overflow = store->OpenRead({1, Slot::kWeight, v1::DTYPE_F16, Flat(0, 2), 0}).value();
  EXPECT_THAT(std::string(overflow->Next().status().message()),
              testing::AllOf(HasSubstr("big"), HasSubstr("65504")));
  EXPECT_TRUE(
      absl::IsInvalidArgument(store->OpenRead({0, Slot::kWeight, v1::DTYPE_I64, box, 0}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      store->OpenRead({0, Slot::kWeight, v1::DTYPE_F32, Flat(kRows * kColumns, 1), 0}).status()));
  EXPECT_TRUE(
      absl::IsInvalidArgument(store->OpenRead({0, Slot::kExpAvg, v1::DTYPE_F32, box, 0}).status()));
}

TEST(Reading, StoredWeightsAreNotCopied) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {2048, 1024}, v1::DTYPE_BF16)}, 1 << 22));
  LoadTensor(store.get(), 0, Normal(2048 * 1024, 1));
  CommitLoad(store.get(), 0);
  const uint64_t used = world.accountant.used_bytes(Tier::kDram);
  auto reader =
      store->OpenRead({0, Slot::kWeight, v1::DTYPE_BF16, WholeTensor(2048 * 1024), 0}).value();
  const ReadChunk first = reader->Next().value(), second = reader->Next().value();
  EXPECT_EQ(first.owner, second.owner);
  EXPECT_EQ(second.bytes.data(), first.bytes.data() + kMiB);
  EXPECT_EQ(world.accountant.used_bytes(Tier::kDram), used);
}

// Reads a whole piece as it is sent: its digest, and what its bytes hash to.
std::pair<Digest128, Digest128> SentAndActual(ShardReader* reader) {
  std::vector<uint8_t> bytes;
  for (;;) {
    const ReadChunk chunk = reader->Next().value();
    bytes.insert(bytes.end(), chunk.bytes.begin(), chunk.bytes.end());
    if (chunk.digest) return {*chunk.digest, DigestOfBytes(bytes)};
  }
}

TEST(Reading, AVersionIsHashedOnce) {
  World world;
  constexpr uint64_t kCount = 1'300'000;  // of bf16: two leaves and a half
  auto store = NewStore(&world, Layout({Parameter("w", {kCount})}, 1 << 22));
  ASSERT_TRUE(store->Configure(AllAdamW(store->layout())).ok());
  LoadTensor(store.get(), 0, Normal(kCount, 1));
  CommitLoad(store.get(), 0);
  ASSERT_TRUE(store->SetLayout(WholeLayout(store->layout())).ok());
  const auto open = [&](int64_t version, v1::DType dtype, const Box& box) {
    return store->OpenRead({0, Slot::kWeight, dtype, box, version, 4 * kMiB}).value();
  };
  const Box whole = WholeTensor(kCount);
  for (const v1::DType dtype : {v1::DTYPE_BF16, v1::DTYPE_F32}) {
    const auto [sent, actual] = SentAndActual(open(0, dtype, whole).get());
    EXPECT_EQ(sent, actual);
  }
  // A byte that changes in memory is sent with the hash of what was right.
  const ReadChunk chunk = open(0, v1::DTYPE_BF16, whole)->Next().value();
  const_cast<uint8_t*>(chunk.bytes.data())[kMiB + 1] ^= 1;
  for (const v1::DType dtype : {v1::DTYPE_BF16, v1::DTYPE_F32}) {
    const auto [sent, actual] = SentAndActual(open(0, dtype, whole).get());
    EXPECT_NE(sent, actual);
  }
  {  // parts of a shard are hashed for each reader
    const auto [sent, actual] = SentAndActual(open(0, v1::DTYPE_BF16, Flat(0, kCount - 1)).get());
    EXPECT_EQ(sent, actual);
  }
  const auto late = open(0, v1::DTYPE_BF16, Flat(0, kCount)), last = open(0, v1::DTYPE_F16, whole);
  AdamWStep(store.get(), 1, 5);
  for (int time = 0; time < 2; ++time) {
    const auto [sent, actual] = SentAndActual(open(1, v1::DTYPE_BF16, whole).get());
    EXPECT_EQ(sent, actual);
    if (time > 0) continue;
    EXPECT_NE(SentAndActual(late.get()).first, sent) << "a reader of the version before";
    const auto [sent_last, actual_last] = SentAndActual(last.get());
    EXPECT_EQ(sent_last, actual_last) << "hashed after the step, and not kept for it";
  }
}

// ---- Tensors that may be unset ----

Tensor Base(std::vector<uint64_t> shape) {
  Tensor base = Parameter("base", std::move(shape));
  base.may_be_unset = true;
  return base;
}

OwnedShards TrainedAndBase() {
  return Layout({Parameter("w", {64, 100}), Base({512, 512})}, 100'000);
}

// "w" is trained, "base" is frozen.
std::vector<TensorOptimizer> OnlyFirst(const OwnedShards& layout) {
  std::vector<TensorOptimizer> optimizers = AllAdamW(layout);
  for (size_t i = 1; i < optimizers.size(); ++i) optimizers[i] = {};
  return optimizers;
}

TEST(Unset, TakesNoRoomUntilALoadSetsIt) {
  World world(4 * kMiB);
  const OwnedShards layout = TrainedAndBase();
  auto store = NewStore(&world, layout);
  ASSERT_TRUE(store->Configure(OnlyFirst(layout)).ok());
  const uint64_t before = world.accountant.reserved_bytes(Tier::kDram);
  EXPECT_LT(before, 1 * kMiB);  // "base" has 1 MiB
  EXPECT_EQ(RestBytes(store.get(), 1), 0u);
  LoadTensor(store.get(), 0, Normal(6400, 1));
  CommitLoad(store.get(), 0);  // the first LOAD leaves "base" out
  const int32_t shard = layout.shards.back().id;
  const ReadRequest request{shard, Slot::kMaster, v1::DTYPE_F32, WholeTensor(512 * 512), 0};
  EXPECT_TRUE(absl::IsNotFound(store->OpenRead(request).status()));
  EXPECT_EQ(DetailOf(store->OpenRead(request).status()).reason(), v1::ErrorDetail::UNSET);
  // A part of it alone is refused when the LOAD is staged.
  ASSERT_TRUE(Send(store->BeginLoad(shard, Slot::kWeight, v1::DTYPE_F32,
                                    {{layout.shards.back().range.begin}, {256}, true}),
                   AsBytes(Normal(256, 2)))
                  .ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(StageLoad(store.get(), shard).status()));
  store->DropStaged();
  const auto values = Normal(512 * 512, 3);
  LoadTensor(store.get(), 1, values);
  CommitLoad(store.get(), 1);
  EXPECT_GE(world.accountant.reserved_bytes(Tier::kDram), before + 1 * kMiB);
  std::vector<uint8_t> read;
  for (const OwnedShard& owned : layout.shards)
    if (owned.tensor == 1) {
      const auto part =
          Read(store.get(), {owned.id, Slot::kMaster, v1::DTYPE_F32, WholeTensor(512 * 512), 1});
      read.insert(read.end(), part.begin(), part.end());
    }
  EXPECT_EQ(read, AsBytes(values));
}

TEST(Unset, GetsItsRoomOnDiskIfMemoryIsShort) {
  World world(2 * kMiB, 64 * kMiB);
  const OwnedShards layout = Layout({Parameter("w", {64, 100}), Base({4096, 512})}, 100'000);
  auto store = NewStore(&world, layout);
  ASSERT_TRUE(store->Configure(OnlyFirst(layout)).ok());
  LoadTensor(store.get(), 0, Normal(6400, 1));
  CommitLoad(store.get(), 0);
  const auto values = Normal(4096 * 512, 3);  // 8 MiB
  LoadTensor(store.get(), 1, values);
  CommitLoad(store.get(), 1);
  EXPECT_GT(world.accountant.used_bytes(Tier::kNvme), 4 * kMiB);
  std::vector<uint8_t> read;
  for (const OwnedShard& owned : layout.shards)
    if (owned.tensor == 1) {
      const auto part =
          Read(store.get(), {owned.id, Slot::kMaster, v1::DTYPE_F32, WholeTensor(4096 * 512), 1});
      read.insert(read.end(), part.begin(), part.end());
    }
  EXPECT_EQ(read, AsBytes(values));
  ASSERT_TRUE(store->SetLayout({}).ok());
  EXPECT_LE(world.accountant.peak_bytes(Tier::kDram), 2 * kMiB);
}

TEST(Unset, IsTrainedOnceItIsSet) {
  World world;
  const OwnedShards layout = Layout({Parameter("w", {64, 100}), Base({64, 100})}, 100'000);
  auto store = NewStore(&world, layout);
  ASSERT_TRUE(store->Configure(OnlyFirst(layout)).ok());
  LoadTensor(store.get(), 0, Normal(6400, 1));
  CommitLoad(store.get(), 0);
  ASSERT_TRUE(store->Configure(AllAdamW(layout)).ok());
  ASSERT_TRUE(store->SetLayout(WholeLayout(layout)).ok());
  EXPECT_EQ(DetailOf(store->BeginGradient(1, 0, 0, v1::DTYPE_F32).status()).reason(),
            v1::ErrorDetail::UNSET);
  LoadTensor(store.get(), 1, Normal(6400, 2));
  CommitLoad(store.get(), 1);
  ASSERT_TRUE(store->SetLayout(WholeLayout(layout)).ok());
  AdamWStep(store.get(), 2, 5);
  EXPECT_EQ(Read(store.get(), {1, Slot::kMaster, v1::DTYPE_F32, WholeTensor(6400), 2}).size(),
            6400u * 4);
}

// ---- Budgets and spilling ----

// Between two steps, an element takes 2 bytes of weight, 2 of remainder, 1 each of exp_avg and
// exp_avg_sq, and 0.03 of absmax.
TEST(Budget, RestIsSixBytesForEachParameter) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {4096, 1024}, v1::DTYPE_BF16)}, 1 << 22));
  ASSERT_TRUE(store->Configure(AllAdamW(store->layout())).ok());
  LoadTensor(store.get(), 0, Normal(1 << 22, 1));
  CommitLoad(store.get(), 0);
  ASSERT_TRUE(store->SetLayout(WholeLayout(store->layout())).ok());
  AdamWStep(store.get(), 1, 3);
  EXPECT_LE(world.accountant.used_bytes(Tier::kDram), 6.1 * (1 << 22));
  EXPECT_EQ(world.accountant.used_bytes(Tier::kDram), RestBytes(store, 0));
}

TEST(Budget, TooSmallNamesTheSmallestThatWouldDo) {
  World world(4 * kMiB);
  auto refused =
      ShardStore::Create(Layout({Parameter("w", {2048, 1024})}, 1 << 22), world.tiers.get());
  ASSERT_TRUE(absl::IsResourceExhausted(refused.status()));
  const uint64_t smallest = std::stoull(DetailOf(refused.status()).limit());
  World enough(smallest);
  EXPECT_TRUE(
      ShardStore::Create(Layout({Parameter("w", {2048, 1024})}, 1 << 22), enough.tiers.get()).ok());
  EXPECT_EQ(world.accountant.reserved_bytes(Tier::kDram), 0u);
}

TEST(Spill, ChangesNoBit) { CheckApplyEqualsKernels(7 * kMiB / 4, 64 * kMiB); }

// The slots take 6.03 MiB and the staging of fp32 gradients 4 MiB, which is just over the budget.
TEST(Spill, MakesRoomForStagingAndComesBack) {
  World world(10 * kMiB, 64 * kMiB);
  auto store = NewStore(&world, Layout({Parameter("w", {1024, 1024})}, 1 << 18));
  ASSERT_TRUE(store->Configure(AllAdamW(store->layout())).ok());
  LoadTensor(store.get(), 0, Normal(1 << 20, 1));
  CommitLoad(store.get(), 0);
  const auto before = AllBytes(store.get(), 0);
  const absl::Status joined = store->SetLayout(WholeLayout(store->layout()));
  ASSERT_TRUE(joined.ok()) << joined;
  EXPECT_GT(world.accountant.reserved_bytes(Tier::kNvme), 0u);
  EXPECT_EQ(AllBytes(store.get(), 0), before);
  AdamWStep(store.get(), 1, 3);
  AdamWStep(store.get(), 2, 4);
  EXPECT_LE(world.accountant.peak_bytes(Tier::kDram), 10 * kMiB);
}

TEST(Spill, RefusesWhenTheDiskIsFullToo) {
  World world(10 * kMiB, 1 * kMiB);
  auto store = NewStore(&world, Layout({Parameter("w", {1024, 1024})}, 1 << 18));
  ASSERT_TRUE(store->Configure(AllAdamW(store->layout())).ok());
  // Two contributors push every shard whole.
  EXPECT_TRUE(absl::IsResourceExhausted(store->SetLayout(WholeLayout(store->layout(), 2))));
}

// A LOAD does not use the room that is reserved for the staging of gradients, so the new contents
// of a spilled slot are assembled there before they are written to disk.
TEST(Spill, LoadsOverItsBudgetThroughTheStagingOfGradients) {
  World world(7 * kMiB, 64 * kMiB), easy;
  const OwnedShards layout = Layout({Parameter("w", {1024, 1024})}, 1 << 18);
  auto store = NewStore(&world, layout), other = NewStore(&easy, layout);
  for (ShardStore* each : {store.get(), other.get()}) {
    ASSERT_TRUE(each->Configure(AllAdamW(layout)).ok());
    ASSERT_TRUE(each->SetLayout(WholeLayout(layout)).ok());
    for (int64_t step : {0, 2}) {
      LoadTensor(each, 0, Normal(1 << 20, step));
      LoadTensor(each, 0, Normal(1 << 20, step + 10), Slot::kExpAvg);
      CommitLoad(each, step);
      AdamWStep(each, step + 1, 3);
    }
  }
  EXPECT_EQ(AllBytes(store.get(), 3), AllBytes(other.get(), 3));
  EXPECT_LE(world.accountant.peak_bytes(Tier::kDram), 7 * kMiB);
}

// The pieces of a LOAD were written to disk, because their slots were there. Then the slots come
// back to memory, and the LOAD is applied. It must outlast the next spill and the next step.
TEST(Spill, SlotsComeBackWhileALoadIsStaged) {
  World world(13 * kMiB, 64 * kMiB), easy;
  const OwnedShards layout = Layout({Parameter("w", {1024, 1024})}, 1 << 18);
  auto store = NewStore(&world, layout), other = NewStore(&easy, layout);
  for (ShardStore* each : {store.get(), other.get()}) {
    ASSERT_TRUE(each->Configure(AllAdamW(layout)).ok());
    ASSERT_TRUE(each->SetLayout(WholeLayout(layout)).ok());
  }
  const auto spill_all = [&] {
    auto rest = world.tiers->Reserve({Tier::kDram, "other", "weight"}, 7 * kMiB);
    EXPECT_TRUE(rest.ok()) << rest.status();
    return rest;
  };
  for (int64_t step : {0, 2}) {
    const auto values = Normal(1 << 20, step);
    {
      const auto rest = spill_all();
      ASSERT_NO_FATAL_FAILURE(LoadTensor(store.get(), 0, values));
    }
    while (world.tiers->BringBack(std::chrono::steady_clock::now() + std::chrono::hours(1))) {
    }
    const ShardStatus status = store->Describe(0).value();
    for (const SlotStatus& slot : status.slots) EXPECT_EQ(slot.tier, Tier::kDram);
    ASSERT_NO_FATAL_FAILURE(CommitLoad(store.get(), step));
    LoadTensor(other.get(), 0, values);
    CommitLoad(other.get(), step);
    (void)spill_all();
    EXPECT_EQ(AllBytes(store.get(), step), AllBytes(other.get(), step));
    for (ShardStore* each : {store.get(), other.get()})
      ASSERT_NO_FATAL_FAILURE(AdamWStep(each, step + 1, 3));
    EXPECT_EQ(AllBytes(store.get(), step + 1), AllBytes(other.get(), step + 1));
  }
  store.reset();
  EXPECT_EQ(world.disk.ScanBulk("").value(), std::vector<std::string>());
}

TEST(Spill, RefusesAPushWhileTheDiskHasNoRoomForItsApply) {
  World world(10 * kMiB, 64 * kMiB);
  auto store = NewStore(&world, Layout({Parameter("w", {1024, 1024})}, 1 << 18));
  ASSERT_TRUE(store->Configure(AllAdamW(store->layout())).ok());
  ASSERT_TRUE(store->SetLayout(WholeLayout(store->layout())).ok());
  LoadTensor(store.get(), 0, Normal(1 << 20, 1));
  CommitLoad(store.get(), 0);
  world.free_disk_bytes = 16 * kMiB;  // the margin that Tiers leaves free on the disk
  const absl::Status refused = store->BeginGradient(0, 0, 0, v1::DTYPE_F32).status();
  EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  EXPECT_EQ(DetailOf(refused).reason(), v1::ErrorDetail::BUDGET);
  world.free_disk_bytes = 64 * kMiB;
  AdamWStep(store.get(), 1, 3);
}

TEST(Spill, FlippedByteIsDataLossByName) {
  World world(3 * kMiB / 2, 64 * kMiB);
  auto store = NewStore(&world, Layout({Parameter("layer.w", {300, 1000})}, 25'600));
  ASSERT_TRUE(store->Configure(AllAdamW(store->layout())).ok());
  LoadTensor(store.get(), 0, Normal(300'000, 1));
  CommitLoad(store.get(), 0);
  ASSERT_TRUE(store->SetLayout(WholeLayout(store->layout())).ok());
  AdamWStep(store.get(), 1, 3);
  world.disk.FlipReadsOf("/exp_avg/");
  PushTensor(store.get(), 0, 0, Normal(300'000, 4));
  int lost = 0;
  for (const OwnedShard& shard : store->layout().shards) {
    ASSERT_TRUE(StageGradient(store, shard.id).ok());
    const absl::Status status =
        store->Apply(shard.id, {ShardUpdate::Kind::kApply, 2, false, AdamW(1)});
    if (status.ok()) continue;
    ++lost;
    EXPECT_TRUE(absl::IsDataLoss(status)) << status;
    EXPECT_THAT(std::string(status.message()),
                testing::AllOf(HasSubstr("layer.w"), HasSubstr("exp_avg")));
    EXPECT_EQ(store->version(shard.id).value(), 1);
  }
  EXPECT_GT(lost, 0);
}

// A reservation of another job spills slots of this one, but the disk fails before the spills have
// freed enough memory for the window. The next apply must reserve the window itself.
TEST(Spill, ApplyReservesTheWindowThatASpillOwes) {
  World world(7 * kMiB / 2, 64 * kMiB), easy;
  const OwnedShards layout = Layout({Parameter("w", {300, 1000})}, 25'600);
  auto store = NewStore(&world, layout), other = NewStore(&easy, layout);
  for (ShardStore* each : {store.get(), other.get()}) {
    ASSERT_TRUE(each->Configure(AllAdamW(layout)).ok());
    ASSERT_TRUE(each->SetLayout(WholeLayout(layout)).ok());
    LoadTensor(each, 0, Normal(300'000, 1));
    CommitLoad(each, 0);
    ASSERT_NO_FATAL_FAILURE(AdamWStep(each, 1, 3));
  }
  ASSERT_EQ(world.accountant.reserved_bytes(Tier::kNvme), 0u);
  const Use others{Tier::kDram, "other", "weight"};
  const auto rest = world.accountant.Reserve(others, world.accountant.free_bytes(Tier::kDram));
  ASSERT_TRUE(rest.ok());
  world.disk.FailWritesAfter(3, absl::ResourceExhaustedError("no space left on device"));
  EXPECT_TRUE(absl::IsResourceExhausted(world.tiers->Reserve(others, kMiB / 8).status()));
  world.disk.Heal();
  ASSERT_GT(world.accountant.used_bytes(Tier::kNvme), 0u);
  const auto freed = world.accountant.Reserve(others, world.accountant.free_bytes(Tier::kDram));
  ASSERT_TRUE(freed.ok());
  for (ShardStore* each : {store.get(), other.get()})
    for (int step = 2; step < 4; ++step) ASSERT_NO_FATAL_FAILURE(AdamWStep(each, step, 3 * step));
  EXPECT_EQ(AllBytes(store.get(), 3), AllBytes(other.get(), 3));
}

TEST(Spill, FullDiskInAnApplyLosesNothing) {
  World world(7 * kMiB / 4, 64 * kMiB), easy(64 * kMiB);
  const OwnedShards layout = Layout({Parameter("w", {300, 1000})}, 25'600);
  auto store = NewStore(&world, layout), other = NewStore(&easy, layout);
  for (ShardStore* each : {store.get(), other.get()}) {
    ASSERT_TRUE(each->Configure(AllAdamW(layout)).ok());
    LoadTensor(each, 0, Normal(300'000, 1));
    CommitLoad(each, 0);
    ASSERT_TRUE(each->SetLayout(WholeLayout(layout)).ok());
    AdamWStep(each, 1, 3);
    PushTensor(each, 0, 0, Normal(300'000, 4));
    for (const OwnedShard& shard : layout.shards) ASSERT_TRUE(StageGradient(each, shard.id).ok());
  }
  world.disk.FailWritesAfter(3, absl::ResourceExhaustedError("no space left on device"));
  // In the second round the disk works again.
  for (const bool healed : {false, true})
    for (const OwnedShard& shard : layout.shards) {
      if (store->version(shard.id).value() == 2) continue;
      const absl::Status status =
          store->Apply(shard.id, {ShardUpdate::Kind::kApply, 2, false, AdamW(1)});
      EXPECT_TRUE(status.ok() || (!healed && absl::IsResourceExhausted(status))) << status;
      if (!healed && shard.id == layout.shards.back().id) world.disk.Heal();
    }
  for (const OwnedShard& shard : layout.shards)
    ASSERT_TRUE(other->Apply(shard.id, {ShardUpdate::Kind::kApply, 2, false, AdamW(1)}).ok());
  EXPECT_EQ(AllBytes(store.get(), 2), AllBytes(other.get(), 2));
}

}  // namespace
}  // namespace orlop::server
