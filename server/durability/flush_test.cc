#include "server/durability/flush.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "base/checksum.h"
#include "orlop/v1/types.pb.h"
#include "server/job/contributions.h"
#include "server/job/slots.h"
#include "server/shards/shard_image.h"
#include "server/shards/shard_store.h"
#include "server/shards/testing/shard_fixture.h"
#include "storage/store.h"
#include "storage/testing/faulty_store.h"
#include "storage/testing/memory_store.h"

namespace orlop::server {
namespace {

using testing::HasSubstr;

OwnedShards TestLayout() {
  return Layout({Parameter("embed.w", {64, 200}),
                 Parameter("bias", {100}),
                 {"count", false, {3}, v1::DTYPE_I64}},
                5120);
}

// A job with memory and a disk of its own. Start() takes it to step 2.
struct Running {
  explicit Running(uint64_t dram_bytes = 64 * kMiB, uint64_t nvme_bytes = 0)
      : world(dram_bytes, nvme_bytes) {
    store = ShardStore::Create(TestLayout(), world.tiers.get()).value();
    EXPECT_TRUE(store->Configure(AllAdamW(store->layout())).ok());
  }
  void Start() {
    LoadTensor(store.get(), 0, Normal(12'800, 1));
    LoadTensor(store.get(), 1, Normal(100, 2));
    ASSERT_TRUE(Send(store->BeginLoad(4, Slot::kWeight, v1::DTYPE_I64, WholeTensor(3)),
                     AsBytes(std::vector<int64_t>{1, 2, 3}))
                    .ok());
    CommitLoad(store.get(), 0);
    Join();
    Step(1);
    Step(2);
  }
  void Join() {
    std::vector<ExpectedPiece> pieces = WholeLayout(store->layout());
    pieces.pop_back();  // the buffer has no gradient
    ASSERT_TRUE(store->SetLayout(pieces).ok());
  }
  void Push(int64_t step) {
    PushTensor(store.get(), 0, 0, Normal(12'800, 10 * step));
    PushTensor(store.get(), 1, 0, Normal(100, 10 * step + 1));
  }
  void Finish(int64_t step) {
    for (const OwnedShard& shard : store->layout().shards) {
      ASSERT_TRUE(StageGradient(store, shard.id).ok());
      ASSERT_TRUE(
          store->Apply(shard.id, {ShardUpdate::Kind::kApply, step, false, AdamW(step - 1)}).ok());
    }
  }
  void Step(int64_t step) {
    Push(step);
    Finish(step);
  }
  World world;
  std::unique_ptr<ShardStore> store;
};

FlushHeader Header(int64_t step) {
  return {"job", step, "manifest bytes", std::string("opt\0imizer", 10), "machine"};
}

TEST(Flush, RestoredCopyStepsAsOneThatNeverStopped) {
  auto disk = storage::NewMemoryStore();
  Running original;
  original.Start();
  ASSERT_TRUE(WriteFlush(disk.get(), Header(2), true, original.store.get()).ok());
  Running restored;
  const FlushHeader header = ReadFlushHeader(*disk, "job", 2).value();
  EXPECT_EQ(header.manifest, "manifest bytes");
  EXPECT_EQ(header.optimizer, std::string("opt\0imizer", 10));
  restored.Join();
  const absl::Status loaded = LoadFlush(*disk, "job", 2, true, restored.store.get());
  ASSERT_TRUE(loaded.ok()) << loaded;
  EXPECT_EQ(AllBytes(restored.store.get(), 2), AllBytes(original.store.get(), 2));
  original.Step(3);
  restored.Step(3);
  EXPECT_EQ(AllBytes(restored.store.get(), 3), AllBytes(original.store.get(), 3));
}

// A job that was stopped between the push and the apply continues with its staged pieces, also with
// a shard whose gradient is already summed.
TEST(Flush, KeepsWhatWasStaged) {
  auto disk = storage::NewMemoryStore();
  Running original;
  original.Start();
  original.Push(3);
  const StagedShard staged = StageGradient(original.store, 0).value();
  ASSERT_TRUE(WriteFlush(disk.get(), Header(2), true, original.store.get()).ok());
  Running restored, rolled_back;
  restored.Join();
  ASSERT_TRUE(LoadFlush(*disk, "job", 2, true, restored.store.get()).ok());
  const StagedShard again = StageGradient(restored.store, 0).value();
  EXPECT_EQ(again.digest, staged.digest);
  EXPECT_EQ(again.sum_squares, staged.sum_squares);
  original.Finish(3);
  restored.Finish(3);
  EXPECT_EQ(AllBytes(restored.store.get(), 3), AllBytes(original.store.get(), 3));
  ASSERT_TRUE(LoadFlush(*disk, "job", 2, false, rolled_back.store.get()).ok());
  EXPECT_TRUE(StageGradient(rolled_back.store, 0).value().absent);
}

TEST(Flush, KeepsALoadInProgress) {
  auto disk = storage::NewMemoryStore();
  Running original;
  original.Start();
  LoadTensor(original.store.get(), 0, Normal(12'800, 77));
  ASSERT_TRUE(WriteFlush(disk.get(), Header(2), true, original.store.get()).ok());
  Running restored;
  restored.Join();
  ASSERT_TRUE(LoadFlush(*disk, "job", 2, true, restored.store.get()).ok());
  CommitLoad(original.store.get(), 3);
  CommitLoad(restored.store.get(), 3);
  EXPECT_EQ(AllBytes(restored.store.get(), 3), AllBytes(original.store.get(), 3));
}

// A running job is written down while its next pieces arrive: they are not part of the flush.
TEST(Flush, LeavesOutWhatIsStaged) {
  auto disk = storage::NewMemoryStore();
  Running original, restored;
  original.Start();
  original.Push(3);
  ASSERT_TRUE(WriteFlush(disk.get(), Header(2), false, original.store.get()).ok());
  restored.Join();
  ASSERT_TRUE(LoadFlush(*disk, "job", 2, true, restored.store.get()).ok());
  EXPECT_EQ(restored.store->Describe(0).value().stage, "idle");
  EXPECT_EQ(AllBytes(restored.store.get(), 2), AllBytes(original.store.get(), 2));
  restored.Step(3);
  original.Finish(3);
  EXPECT_EQ(AllBytes(restored.store.get(), 3), AllBytes(original.store.get(), 3));
}

TEST(Flush, WorksAcrossMemoryBudgets) {
  auto disk = storage::NewMemoryStore();
  Running original;
  original.Start();
  ASSERT_TRUE(WriteFlush(disk.get(), Header(2), true, original.store.get()).ok());
  Running small(125 << 10, 16 * kMiB);
  small.Join();
  const absl::Status loaded = LoadFlush(*disk, "job", 2, true, small.store.get());
  ASSERT_TRUE(loaded.ok()) << loaded;
  EXPECT_GT(small.world.accountant.used_bytes(Tier::kNvme), 0u);
  auto disk_again = storage::NewMemoryStore();
  ASSERT_TRUE(WriteFlush(disk_again.get(), Header(2), true, small.store.get()).ok());
  original.Step(3);
  small.Step(3);
  EXPECT_EQ(AllBytes(small.store.get(), 3), AllBytes(original.store.get(), 3));
}

std::vector<int64_t> FlushedSteps(const storage::Store& disk) {
  std::vector<int64_t> steps;
  const std::vector<FlushInfo> flushes = ListFlushes(disk, "job").value();
  steps.reserve(flushes.size());
  for (const FlushInfo& flush : flushes) steps.push_back(flush.step);
  return steps;
}

TEST(Flush, KeepsTheStepsItIsTold) {
  using testing::ElementsAre;
  auto disk = storage::NewMemoryStore();
  Running job;
  job.Start();
  for (int64_t step = 2; step < 6; ++step) {
    for (int i = 0; i < 2; ++i)
      ASSERT_TRUE(WriteFlush(disk.get(), Header(step), true, job.store.get()).ok());
    job.Step(step + 1);
  }
  EXPECT_TRUE(absl::IsFailedPrecondition(WriteFlush(disk.get(), Header(5), true, job.store.get())));
  EXPECT_THAT(FlushedSteps(*disk), ElementsAre(5, 5, 4, 4, 3, 3, 2, 2));
  // Of several flushes of a step, the newest is kept. Step 7 was never written.
  ASSERT_TRUE(KeepFlushes(disk.get(), "job", {2, 5, 7}).ok());
  EXPECT_THAT(FlushedSteps(*disk), ElementsAre(5, 2));
  EXPECT_EQ(ListFlushes(*disk, "job").value()[0].serial, 8u);
  EXPECT_TRUE(absl::IsNotFound(ReadFlushHeader(*disk, "job", 3).status()));
  ASSERT_TRUE(EraseFlushes(disk.get(), "job").ok());
  EXPECT_TRUE(disk->ScanBulk("flush/").value().empty());
}

TEST(Flush, FlippedByteIsDataLossByName) {
  storage::FaultyStore disk(storage::NewMemoryStore());
  Running original;
  original.Start();
  ASSERT_TRUE(WriteFlush(&disk, Header(2), true, original.store.get()).ok());
  disk.FlipReadsOf("/exp_avg_sq");
  Running restored;
  const absl::Status status = LoadFlush(disk, "job", 2, true, restored.store.get());
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
  EXPECT_THAT(std::string(status.message()),
              testing::AllOf(HasSubstr("embed.w"), HasSubstr("exp_avg_sq"), HasSubstr("shard 0")));
  disk.FlipReadsOf("/index");
  EXPECT_TRUE(absl::IsDataLoss(ReadFlushHeader(disk, "job", 2).status()));
}

// If any byte of a head is damaged or missing, its job reports it. Another job is not affected,
// even one whose name has the same beginning.
TEST(Flush, DamagedHeadIsItsJobsAlone) {
  auto disk = storage::NewMemoryStore();
  Running job;
  job.Start();
  FlushHeader other = Header(2);
  other.job = "job/other";
  ASSERT_TRUE(WriteFlush(disk.get(), other, true, job.store.get()).ok());
  ASSERT_TRUE(WriteFlush(disk.get(), Header(2), true, job.store.get()).ok());
  job.Step(3);
  ASSERT_TRUE(WriteFlush(disk.get(), Header(3), true, job.store.get()).ok());
  const auto [key, head] = disk->Scan("flush/job:").value().back();
  for (size_t byte = 0; byte <= head.size(); ++byte) {
    std::string damaged = head.substr(0, byte);
    if (byte % 2 == 0 && byte < head.size()) (damaged = head)[byte] ^= 1;
    if (damaged == head) continue;
    ASSERT_TRUE(disk->Commit({{{key, damaged}}}).ok());
    const auto flushes = ListFlushes(*disk, "job").value();
    ASSERT_EQ(flushes.size(), 2u);
    EXPECT_TRUE(flushes[0].damaged) << byte;
    EXPECT_FALSE(flushes[1].damaged);
    EXPECT_TRUE(absl::IsDataLoss(ReadFlushHeader(*disk, "job", 3).status()));
    EXPECT_TRUE(ReadFlushHeader(*disk, "job", 2).ok());
    EXPECT_FALSE(ListFlushes(*disk, "job/other").value()[0].damaged);
  }
  job.Step(4);
  ASSERT_TRUE(WriteFlush(disk.get(), Header(4), true, job.store.get()).ok());
  ASSERT_TRUE(KeepFlushes(disk.get(), "job", {2, 3, 4}).ok());  // the damaged one goes
  const auto flushes = ListFlushes(*disk, "job").value();
  ASSERT_EQ(flushes.size(), 2u);
  EXPECT_EQ(flushes[0].step, 4);
  EXPECT_EQ(flushes[1].step, 2);
  ASSERT_TRUE(EraseFlushes(disk.get(), "job").ok());
  EXPECT_TRUE(ReadFlushHeader(*disk, "job/other", 2).ok());
}

// A rollback of a running job drops its state, also a slot that a reader has open.
TEST(Flush, ReplacesWhatTheStoreHeld) {
  for (const uint64_t nvme_bytes : {uint64_t{0}, 16 * kMiB}) {
    auto disk = storage::NewMemoryStore();
    Running job(nvme_bytes > 0 ? 150 << 10 : 64 * kMiB, nvme_bytes);
    if (nvme_bytes > 0) job.Join();
    job.Start();
    ASSERT_TRUE(WriteFlush(disk.get(), Header(2), true, job.store.get()).ok());
    const auto before = AllBytes(job.store.get(), 2);
    job.Step(3);
    job.Push(4);
    auto reader =
        job.store->OpenRead({0, Slot::kWeight, v1::DTYPE_F32, WholeTensor(12'800), 3}).value();
    const absl::Status loaded = LoadFlush(*disk, "job", 2, false, job.store.get());
    ASSERT_TRUE(loaded.ok()) << loaded;
    EXPECT_EQ(AllBytes(job.store.get(), 2), before);
    EXPECT_TRUE(reader->Next().ok());
    reader.reset();
    EXPECT_TRUE(StageGradient(job.store, 0).value().absent);
  }
}

TEST(Flush, FullDiskKeepsTheOneBefore) {
  storage::FaultyStore disk(storage::NewMemoryStore());
  Running job;
  job.Start();
  ASSERT_TRUE(WriteFlush(&disk, Header(2), true, job.store.get()).ok());
  const auto before = AllBytes(job.store.get(), 2);
  job.Step(3);
  int failures = 0;
  for (int writes = 0;; ++writes) {
    disk.FailWritesAfter(writes, absl::ResourceExhaustedError("no space left on device"));
    const absl::Status status = WriteFlush(&disk, Header(3), true, job.store.get());
    disk.Heal();
    if (status.ok()) break;
    ++failures;
    EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
    ASSERT_EQ(ListFlushes(disk, "job").value().size(), 1u);
  }
  EXPECT_GT(failures, 10);
  EXPECT_EQ(ListFlushes(disk, "job").value().size(), 2u);
  Running restored;
  ASSERT_TRUE(LoadFlush(disk, "job", 2, true, restored.store.get()).ok());
  EXPECT_EQ(AllBytes(restored.store.get(), 2), before);
}

// A store that records the key and the contents of each value that a flush writes. Digest() covers
// all of them, in order of keys.
class WrittenBytes : public storage::MemoryStore {
 public:
  absl::Status WriteBulk(const std::string& key, absl::Span<const uint8_t> bytes) override {
    written_[key] = std::string(bytes.begin(), bytes.end());
    return storage::MemoryStore::WriteBulk(key, bytes);
  }
  absl::Status Commit(const storage::Batch& batch) override {
    for (const auto& [key, value] : batch.put) written_[key] = value;
    return storage::MemoryStore::Commit(batch);
  }
  std::string Digest() const {
    std::string all;
    for (const auto& [key, value] : written_) all += key + value;
    return ToString(orlop::Digest(all.data(), all.size()));
  }
  size_t count() const { return written_.size(); }

 private:
  std::map<std::string, std::string> written_;
};

// Returns values that do not depend on the random numbers of a library.
std::vector<float> Ramp(size_t count, uint32_t seed) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i)
    values[i] = static_cast<float>((i * 7919 + size_t{seed} * 104'729) % 2003) / 2048 - 0.5f;
  return values;
}

// The expected digests are those of the first release of this format. If one changes, the format
// has changed and needs another kFormat.
TEST(Flush, WritesTheBytesOfFormatOne) {
  WrittenBytes disk;
  Running job;
  for (uint32_t tensor : {0u, 1u}) {
    const uint64_t count = job.store->layout().tensors[tensor].element_count;
    LoadTensor(job.store.get(), tensor, Ramp(count, tensor));
  }
  ASSERT_TRUE(Send(job.store->BeginLoad(4, Slot::kWeight, v1::DTYPE_I64, WholeTensor(3)),
                   AsBytes(std::vector<int64_t>{1, 2, 3}))
                  .ok());
  CommitLoad(job.store.get(), 0);
  std::vector<ExpectedPiece> pieces = WholeLayout(job.store->layout(), 2);
  pieces.resize(pieces.size() - 2);  // the buffer, for each of two ranks, has no gradient
  ASSERT_TRUE(job.store->SetLayout(pieces).ok());
  for (uint32_t rank : {0u, 1u}) {
    PushTensor(job.store.get(), 0, rank, Ramp(12'800, 10 + rank));
    PushTensor(job.store.get(), 1, rank, Ramp(100, 20 + rank));
  }
  job.Finish(1);
  for (uint32_t rank : {0u, 1u}) PushTensor(job.store.get(), 0, rank, Ramp(12'800, 30 + rank));
  PushTensor(job.store.get(), 1, 1, Ramp(100, 40));  // one of two ranks
  ASSERT_TRUE(StageGradient(job.store, 0).ok());
  ASSERT_TRUE(WriteFlush(&disk, Header(1), true, job.store.get()).ok());
  EXPECT_EQ(disk.count(), 31u);
  EXPECT_EQ(disk.Digest(), "3fd1d183bcf0f381769f4979bf8adf9d");

  WrittenBytes with_load;
  job.store->DropStaged();
  LoadTensor(job.store.get(), 1, Ramp(100, 50));
  ASSERT_TRUE(Send(job.store->BeginLoad(0, Slot::kExpAvg, v1::DTYPE_F32, Flat(256, 512)),
                   AsBytes(Ramp(512, 51)))
                  .ok());
  ASSERT_TRUE(StageLoad(job.store, 3).ok());
  ASSERT_TRUE(WriteFlush(&with_load, Header(1), true, job.store.get()).ok());
  EXPECT_EQ(with_load.Digest(), "2e3a00fde2855bda9714f9f65a5a4c04");
}

TEST(Flush, RefusesAnotherPlacement) {
  auto disk = storage::NewMemoryStore();
  Running original;
  original.Start();
  ASSERT_TRUE(WriteFlush(disk.get(), Header(2), true, original.store.get()).ok());
  World world;
  OwnedShards fewer = TestLayout();
  fewer.shards.pop_back();
  auto other = ShardStore::Create(fewer, world.tiers.get()).value();
  EXPECT_TRUE(absl::IsFailedPrecondition(LoadFlush(*disk, "job", 2, true, other.get())));
  auto unconfigured = ShardStore::Create(TestLayout(), world.tiers.get()).value();
  EXPECT_TRUE(absl::IsFailedPrecondition(LoadFlush(*disk, "job", 2, true, unconfigured.get())));
}

}  // namespace
}  // namespace orlop::server
