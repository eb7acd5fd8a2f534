#include "server/runtime/job_runtime.h"

#include <grpcpp/grpcpp.h>
#include <stdlib.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <stop_token>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "base/checksum.h"
#include "base/mutex.h"
#include "base/thread_pool.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "server/cluster/peer_links.h"
#include "server/durability/flush.h"
#include "server/job/manifest.h"
#include "server/job/slots.h"
#include "server/runtime/job_table.h"
#include "server/runtime/leader_shell.h"
#include "server/runtime/machine_shell.h"
#include "server/runtime/piece_intake.h"
#include "server/runtime/wait.h"
#include "server/shards/piece_writer.h"
#include "server/shards/testing/shard_fixture.h"
#include "server/step/actions.h"
#include "server/step/layout.h"
#include "server/step/leader.h"
#include "server/tiers/tier.h"
#include "storage/data_directory.h"
#include "storage/store.h"
#include "storage/testing/faulty_store.h"

namespace orlop::server {
namespace {

using testing::HasSubstr;

constexpr uint64_t kRows = 300, kColumns = 1000, kShardElements = 25'600;

// One server with one job of 12 shards. Some slots are spilled, to a store that fails when a test
// tells it to. Clocks are real: every wait has a deadline that no passing test comes near.
class JobOnAFaultyDisk : public testing::Test {
 protected:
  void SetUp() override {
    char pattern[] = "/tmp/orlop-job-XXXXXX";
    directory_ = mkdtemp(pattern);
    OpenData();
    pool_ = std::make_unique<ThreadPool>(2);
    peers_ = std::make_unique<PeerLinks>(std::vector<PeerAddress>{{"self", "127.0.0.1:1"}},
                                         grpc::InsecureChannelCredentials());
    environment_ = {{"self"}, 0, data_.get(), world_.tiers.get(), pool_.get(), peers_.get(), [] {
                      return v1::ServerInfo();
                    }};
    OpenTable();
    Create(Definition());
  }
  void TearDown() override {
    for (const auto& job : table_->List()) job->Close();
    pool_->Stop();
    job_.reset();
    table_.reset();
    peers_.reset();
    data_.reset();
    std::filesystem::remove_all(directory_);
  }

  void OpenData() {
    const auto wrap = [this](std::unique_ptr<storage::Store> store) {
      auto faulty = std::make_unique<storage::FaultyStore>(std::move(store));
      data_disk_ = faulty.get();
      return faulty;
    };
    data_ = storage::DataDirectory::Open({directory_, "self", 32 << 20, wrap}).value();
    environment_.data = data_.get();
  }
  void OpenTable() {
    table_ = std::make_unique<JobTable>(environment_);
    const absl::Status opened = table_->OpenAll();
    ASSERT_TRUE(opened.ok()) << opened;
  }
  // Creates a job. The methods below use it from now on.
  void Create(const v1::JobDefinition& definition) {
    const absl::Status put = table_->Put(definition);
    ASSERT_TRUE(put.ok()) << put;
    Use(definition.manifest().job());
  }
  void Use(const std::string& job) {
    job_ = table_->Find(job).value();
    AwaitRecovery(job_.get());
  }
  // Opens the data directory as the next process of the server would. Without a stop before, the
  // process counts as killed.
  void Restart() {
    for (const auto& job : table_->List()) job->Close();
    job_.reset();
    table_.reset();
    pool_ = std::make_unique<ThreadPool>(2);
    environment_.pool = pool_.get();
    data_.reset();
    OpenData();
    OpenTable();
  }

  static v1::JobDefinition Definition(const std::string& job = "job", uint64_t rows = kRows) {
    v1::JobDefinition definition;
    v1::CreateJobRequest& manifest = *definition.mutable_manifest();
    manifest.set_job(job);
    manifest.set_shard_elements(kShardElements);
    v1::TensorSpec& tensor = *manifest.add_tensors();
    tensor.set_name("layer.w");
    tensor.set_kind(v1::TENSOR_KIND_PARAMETER);
    tensor.set_dtype(v1::DTYPE_F32);
    tensor.add_shape(rows);
    tensor.add_shape(kColumns);
    EXPECT_TRUE(CompleteManifest(&manifest).ok());
    const Digest128 digest = ManifestDigest(manifest);
    definition.mutable_manifest_digest()->set_high(digest.high);
    definition.mutable_manifest_digest()->set_low(digest.low);
    definition.set_server_count(1);
    v1::PlacementRun& run = *definition.add_runs();
    run.set_shard_count(ShardCount(rows * kColumns, kShardElements));
    run.add_servers(0);
    v1::OptimizerGroup& group = *definition.mutable_optimizer()->add_groups();
    group.set_optimizer("adamw");
    group.set_state("8bit");
    group.add_tensors(0);
    definition.set_revision(1);
    return definition;
  }

  static Wait Soon() {
    return {std::chrono::steady_clock::now() + std::chrono::seconds(30), nullptr};
  }
  // Asks the leader, and waits for its answer.
  template <typename Request>
  absl::StatusOr<step::Answer> Ask(step::RequestId (LeaderShell::*call)(const Request&, Caller),
                                   const Request& request, const Wait& wait = Soon()) {
    LeaderShell& leader = *job_->leader();
    return leader.Await(wait,
                        [&](Caller caller) { return (leader.*call)(request, std::move(caller)); });
  }
  static void AwaitRecovery(JobRuntime* job) {
    LeaderShell& leader = *job->leader();
    const auto recovered = leader.Await(
        Soon(), [&](Caller caller) { return leader.AwaitRecovery(std::move(caller)); });
    EXPECT_TRUE(recovered.ok()) << recovered.status();
  }
  Box Whole() const {
    const uint64_t rows = job_->shards().layout().tensors[0].element_count / kColumns;
    return {{0, 0}, {rows, kColumns}, false};
  }

  void Join() {
    step::JoinRequest join;
    join.generation = Ask(&LeaderShell::Join, join).value().generation_issued;
    join.contributions = {{0, step::Mode::kExactlyOnce, {Whole()}}};
    const auto joined = Ask(&LeaderShell::Join, join);
    ASSERT_TRUE(joined.ok()) << joined.status();
    generation_ = join.generation;
  }

  // Pushes the part of `values` that is in one shard; tries again while the answer is Unavailable.
  absl::Status Push(const OwnedShard& shard, bool is_load, const std::vector<float>& values) {
    for (;;) {
      const absl::Status status = PushOnce(shard, is_load, values);
      if (!absl::IsUnavailable(status)) return status;
      job_->AwaitVersion(shard.id, job_->position().committed_step, Soon()).IgnoreError();
    }
  }
  absl::Status PushOnce(const OwnedShard& shard, bool is_load, const std::vector<float>& values) {
    BegunPiece begun = Begin(shard, is_load);
    if (!begun.ticket.has_value()) return begun.status;
    const auto bytes = BytesOf(shard, values);
    if (absl::Status sent = Write(begun.ticket->writer.get(), bytes); !sent.ok()) return sent;
    return job_->EndPiece(*std::move(begun.ticket), DigestOfBytes(bytes), Soon()).status();
  }
  BegunPiece Begin(const OwnedShard& shard, bool is_load) {
    const step::Position position = job_->position();
    PieceRequest request;
    request.key = {0, generation_, position.committed_step + 1,
                   std::max<int64_t>(position.attempt, 1)};
    request.shard = shard.id;
    request.box = is_load ? FlatBox(shard.range.begin, shard.range.count()) : Whole();
    request.dtype = v1::DTYPE_F32;
    request.is_load = is_load;
    return job_->BeginPiece(request, std::make_shared<Wakeup>());
  }
  static absl::Status Write(PieceWriter* writer, const std::vector<uint8_t>& bytes) {
    const absl::Span<const uint8_t> slices[] = {bytes};
    return writer->WriteChunk(
        0, slices,
        ChunkChecksum(LeafHashes({reinterpret_cast<const char*>(bytes.data()), bytes.size()})));
  }
  static std::vector<uint8_t> BytesOf(const OwnedShard& shard, const std::vector<float>& values) {
    return AsBytes(
        std::vector<float>(values.begin() + shard.range.begin, values.begin() + shard.range.end));
  }

  // Commits the next step, or repeats the commit of `step` if that is given.
  absl::Status Commit(bool is_load = false, int64_t step = -1) {
    const step::JobStatusReport status = job_->leader()->Status();
    step::CommitRequest commit;
    commit.generation = generation_;
    commit.step = step >= 0 ? step : status.position.committed_step + 1;
    commit.attempt = status.position.attempt;
    commit.is_load = is_load;
    if (!is_load) {
      step::ParameterGroup group;
      const std::pair<const char*, double> values[] = {
          {"lr", 1e-3}, {"beta1", 0.9}, {"beta2", 0.999}, {"eps", 1e-8}, {"weight_decay", 0.01}};
      for (const auto& [name, value] : values)
        group.values.push_back({name, std::bit_cast<uint64_t>(value)});
      commit.groups = {group};
    }
    return Ask(&LeaderShell::Commit, commit).status();
  }

  // Ticks while it lives. A write that failed may say so after any one tick; the next one makes it
  // again.
  class Ticker {
   public:
    explicit Ticker(std::shared_ptr<JobRuntime> job)
        : thread_([job = std::move(job)](const std::stop_token& stop) {
            for (; !stop.stop_requested();
                 std::this_thread::sleep_for(std::chrono::milliseconds(5)))
              job->Tick();
          }) {}

   private:
    std::jthread thread_;
  };

  // Keeps every thread of the pool busy while it lives.
  class BusyPool {
   public:
    explicit BusyPool(ThreadPool* pool) {
      for (int i = 0; i < pool->thread_count(); ++i)
        pool->Submit([state = state_] {
          MutexLock lock(&state->mutex);
          while (!state->is_over) state->over.Wait(&state->mutex);
        });
    }
    ~BusyPool() {
      MutexLock lock(&state_->mutex);
      state_->is_over = true;
      state_->over.SignalAll();
    }

   private:
    struct State {
      Mutex mutex;
      CondVar over;
      bool is_over GUARDED_BY(mutex) = false;
    };
    const std::shared_ptr<State> state_ = std::make_shared<State>();
  };

  void Load() {
    ASSERT_NO_FATAL_FAILURE(Join());
    for (const OwnedShard& shard : job_->shards().layout().shards) {
      const absl::Status pushed = Push(shard, true, Normal(kRows * kColumns, 1));
      ASSERT_TRUE(pushed.ok()) << pushed;
    }
    ASSERT_TRUE(Commit(/*is_load=*/true).ok());
  }
  void LoadAndStep() {
    ASSERT_NO_FATAL_FAILURE(Load());
    // The step of a push is taken from the participant. It may hear later than the caller that the
    // load is committed.
    for (const OwnedShard& shard : job_->shards().layout().shards)
      ASSERT_TRUE(job_->AwaitVersion(shard.id, 0, Soon()).ok());
    ASSERT_NO_FATAL_FAILURE(Step(2));
    for (const OwnedShard& shard : job_->shards().layout().shards)
      ASSERT_TRUE(job_->AwaitVersion(shard.id, 1, Soon()).ok());
    ASSERT_GT(world_.accountant.used_bytes(Tier::kNvme), 0u)
        << "nothing spills: the budget of this test is too large";
  }
  void Step(uint32_t seed) {
    for (const OwnedShard& shard : job_->shards().layout().shards) {
      const absl::Status pushed = Push(shard, false, Normal(kRows * kColumns, seed));
      ASSERT_TRUE(pushed.ok()) << pushed;
    }
    const absl::Status committed = Commit();
    ASSERT_TRUE(committed.ok()) << committed;
  }

  World world_{11 * kMiB / 4, 64 * kMiB};
  std::string directory_;
  std::unique_ptr<storage::DataDirectory> data_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<PeerLinks> peers_;
  Environment environment_;
  storage::FaultyStore* data_disk_ = nullptr;  // under data_
  std::unique_ptr<JobTable> table_;
  std::shared_ptr<JobRuntime> job_;
  int64_t generation_ = 0;
};

TEST_F(JobOnAFaultyDisk, APieceTakesTheJobsLockTwice) {
  ASSERT_NO_FATAL_FAILURE(Load());
  const OwnedShard& shard = job_->shards().layout().shards.front();
  ASSERT_TRUE(job_->AwaitVersion(shard.id, 0, Soon()).ok());
  const auto bytes = BytesOf(shard, Normal(kRows * kColumns, 2));
  const step::Position position = job_->position();
  PieceRequest request;
  request.key = {0, generation_, position.committed_step + 1, position.attempt};
  request.shard = shard.id;
  request.box = Whole();
  request.dtype = v1::DTYPE_F32;
  const BusyPool busy(pool_.get());  // so that no task of the pool takes the lock meanwhile
  const uint64_t before = job_->lock_count();
  BegunPiece begun = job_->BeginPiece(request, std::make_shared<Wakeup>());
  ASSERT_TRUE(begun.ticket.has_value()) << begun.status;
  ASSERT_TRUE(Write(begun.ticket->writer.get(), bytes).ok());
  const auto ended = job_->EndPiece(*std::move(begun.ticket), DigestOfBytes(bytes), Soon());
  EXPECT_EQ(job_->lock_count() - before, 2u);
  ASSERT_TRUE(ended.ok()) << ended.status();
  EXPECT_FALSE(*ended);
}

TEST_F(JobOnAFaultyDisk, APieceAheadOfTheServerIsAnsweredLaterAndWoken) {
  ASSERT_NO_FATAL_FAILURE(Load());
  const OwnedShard& shard = job_->shards().layout().shards.front();
  ASSERT_TRUE(job_->AwaitVersion(shard.id, 0, Soon()).ok());
  PieceRequest request;
  request.key = {0, generation_ + 1, 1, 1};
  request.shard = shard.id;
  request.box = Whole();
  request.dtype = v1::DTYPE_F32;
  const auto wakeup = std::make_shared<Wakeup>();
  const BegunPiece begun = job_->BeginPiece(request, wakeup);
  EXPECT_TRUE(begun.is_later);
  EXPECT_FALSE(begun.ticket.has_value());
  EXPECT_EQ(begun.status.code(), absl::StatusCode::kFailedPrecondition) << begun.status;
  ASSERT_NO_FATAL_FAILURE(Join());  // the generation forms
  EXPECT_EQ(generation_, request.key.generation);
  const auto deadline = Soon().deadline;
  wakeup->Sleep(deadline);
  EXPECT_LT(std::chrono::steady_clock::now(), deadline) << "nobody woke the caller";
  request.key.attempt = job_->position().attempt;
  const BegunPiece again =
      AskUntilAnswered(Soon(), [&](const auto& w) { return job_->BeginPiece(request, w); });
  EXPECT_TRUE(again.ticket.has_value()) << again.status;
}

// A committed step whose apply cannot read a spilled slot: the shard is lost by name, the others
// serve the step, and nothing hangs.
TEST_F(JobOnAFaultyDisk, UnreadableSlotIsDataLossOfItsShardByName) {
  ASSERT_NO_FATAL_FAILURE(LoadAndStep());
  const std::vector<OwnedShard>& shards = job_->shards().layout().shards;
  world_.disk.FailReadsOf("/exp_avg/");
  ASSERT_NO_FATAL_FAILURE(Step(3));
  std::vector<OwnedShard> lost, served;
  for (const OwnedShard& shard : shards) {
    const absl::Status status = job_->AwaitVersion(shard.id, 2, Soon()).status();
    (status.ok() ? served : lost).push_back(shard);
    if (status.ok()) continue;
    EXPECT_TRUE(absl::IsDataLoss(status)) << status;
    EXPECT_THAT(std::string(status.message()),
                testing::AllOf(HasSubstr("layer.w"), HasSubstr("exp_avg")));
  }
  ASSERT_FALSE(lost.empty());
  ASSERT_FALSE(served.empty());
  world_.disk.FailReadsOf("");
  for (const OwnedShard& shard : {lost[0], served[0]}) {
    const absl::Status pushed = Push(shard, false, Normal(kRows * kColumns, 4));
    EXPECT_TRUE(absl::IsDataLoss(pushed)) << pushed;
    EXPECT_THAT(std::string(pushed.message()), HasSubstr("layer.w"));
  }
  EXPECT_TRUE(absl::IsDataLoss(Commit()));
  EXPECT_TRUE(absl::IsDataLoss(Commit(/*is_load=*/true)));
  const auto before = std::chrono::steady_clock::now();
  EXPECT_TRUE(absl::IsDataLoss(
      job_->Stop(before + std::chrono::hours(1))));  // returns, and not by the deadline
}

// A version that AwaitVersion has promised to a pull stays until the pull has opened its read, even
// if the next step is committed meanwhile.
TEST_F(JobOnAFaultyDisk, ApplyWaitsForAPullThatOpens) {
  ASSERT_NO_FATAL_FAILURE(LoadAndStep());
  const std::vector<OwnedShard>& shards = job_->shards().layout().shards;
  for (const OwnedShard& shard : shards)
    ASSERT_TRUE(Push(shard, false, Normal(kRows * kColumns, 3)).ok());
  const auto begin = std::chrono::steady_clock::now();
  {
    const auto pin = job_->AwaitVersion(shards[0].id, 1, Soon());
    ASSERT_TRUE(pin.ok()) << pin.status();
    ASSERT_TRUE(Commit().ok());
    for (size_t i = 1; i < shards.size(); ++i)
      ASSERT_TRUE(job_->AwaitVersion(shards[i].id, 2, Soon()).ok());
    const absl::Status opened =
        job_->shards()
            .OpenRead({shards[0].id, Slot::kWeight, v1::DTYPE_F32, Whole(), 1, kMaxChunkBytes})
            .status();
    if (std::chrono::steady_clock::now() - begin > std::chrono::milliseconds(900))
      GTEST_SKIP() << "a pin holds for a second, and this machine took as long";
    EXPECT_TRUE(opened.ok()) << opened;
  }
  EXPECT_TRUE(job_->AwaitVersion(shards[0].id, 2, Soon()).ok());
}

// The disk fills up after a commit. The apply waits, and ends when there is room again.
TEST_F(JobOnAFaultyDisk, FullDiskDelaysACommittedStepAndLosesNothing) {
  ASSERT_NO_FATAL_FAILURE(LoadAndStep());
  for (const OwnedShard& shard : job_->shards().layout().shards)
    ASSERT_TRUE(Push(shard, false, Normal(kRows * kColumns, 3)).ok());
  world_.disk.FailWritesAfter(3, absl::ResourceExhaustedError("no space left on device"));
  ASSERT_TRUE(Commit().ok());
  EXPECT_FALSE(job_->Stop(std::chrono::steady_clock::now()).ok());
  world_.disk.Heal();
  for (const auto end = Soon().deadline;
       !job_->Stop(std::chrono::steady_clock::now() + std::chrono::milliseconds(50)).ok();
       job_->Tick())
    ASSERT_LT(std::chrono::steady_clock::now(), end);
  EXPECT_EQ(ListFlushes(data_->store(), "job").value()[0].step, 2);
}

// A job whose newest flush is damaged has lost its memory. The flush before is not taken for it.
TEST_F(JobOnAFaultyDisk, DamagedFlushIsLostMemory) {
  ASSERT_NO_FATAL_FAILURE(LoadAndStep());
  ASSERT_TRUE(job_->Stop(Soon().deadline).ok());
  const auto [key, head] = data_->store().Scan("flush/job:").value().back();
  ASSERT_TRUE(data_->store().Commit({{{key, head.substr(1)}}}).ok());
  ASSERT_NO_FATAL_FAILURE(Restart());
  Use("job");
  EXPECT_TRUE(job_->leader()->HasLostMemory());
  EXPECT_FALSE(job_->leader()->Status().serving);
  EXPECT_TRUE(absl::IsDataLoss(job_->AwaitVersion(0, 1, Soon()).status()));
}

// The deadline of a stop limits what the flush waits for, not the flush itself.
TEST_F(JobOnAFaultyDisk, FlushMayTakeLongerThanTheDeadline) {
  ASSERT_NO_FATAL_FAILURE(LoadAndStep());
  const absl::Status stopped = table_->Stop(std::chrono::steady_clock::now());
  ASSERT_TRUE(stopped.ok()) << stopped;
  ASSERT_NO_FATAL_FAILURE(Restart());
  Use("job");
  EXPECT_FALSE(job_->leader()->HasLostMemory());
  EXPECT_TRUE(job_->AwaitVersion(0, 1, Soon()).ok());
}

// Nor does it limit the apply of a committed step, however slow the disk of spilled slots is.
TEST_F(JobOnAFaultyDisk, ApplyMayTakeLongerThanTheDeadline) {
  ASSERT_NO_FATAL_FAILURE(LoadAndStep());
  world_.disk.HangWrites();
  ASSERT_NO_FATAL_FAILURE(Step(3));
  world_.disk.AwaitHangingWrite();
  std::jthread heal([this] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    world_.disk.Heal();
  });
  const absl::Status stopped = table_->Stop(std::chrono::steady_clock::now());
  ASSERT_TRUE(stopped.ok()) << stopped;
  ASSERT_NO_FATAL_FAILURE(Restart());
  Use("job");
  EXPECT_TRUE(job_->AwaitVersion(0, 2, Soon()).ok());
}

// A flush is all of a job's state only until the job starts again.
TEST_F(JobOnAFaultyDisk, KilledAfterACleanStopIsLostMemory) {
  ASSERT_NO_FATAL_FAILURE(LoadAndStep());
  ASSERT_TRUE(table_->Stop(Soon().deadline).ok());
  ASSERT_NO_FATAL_FAILURE(Restart());
  Use("job");
  EXPECT_FALSE(job_->leader()->HasLostMemory());
  ASSERT_NO_FATAL_FAILURE(Restart());  // without a stop: as killed
  Use("job");
  EXPECT_TRUE(job_->leader()->HasLostMemory());
}

// A job that has lost its memory has nothing to flush. After its clean stop it still counts as
// having lost its memory.
TEST_F(JobOnAFaultyDisk, StopOfAJobThatLostItsMemoryLosesNothingMore) {
  ASSERT_NO_FATAL_FAILURE(LoadAndStep());
  ASSERT_TRUE(table_->Stop(Soon().deadline).ok());
  ASSERT_NO_FATAL_FAILURE(Restart());
  ASSERT_NO_FATAL_FAILURE(Restart());  // without a stop: as killed
  Use("job");
  ASSERT_TRUE(job_->leader()->HasLostMemory());
  const absl::Status stopped = table_->Stop(Soon().deadline);
  ASSERT_TRUE(stopped.ok()) << stopped;
  ASSERT_NO_FATAL_FAILURE(Restart());
  Use("job");
  EXPECT_TRUE(job_->leader()->HasLostMemory());
  ASSERT_FALSE(job_->leader()->Status().rollback_offers.empty());
  EXPECT_EQ(job_->leader()->Status().rollback_offers.front().step, 1);
}

// If the state of one job is damaged, the stop fails, but the other jobs lose nothing.
TEST_F(JobOnAFaultyDisk, JobThatCannotBeFlushedCostsNoOtherItsState) {
  ASSERT_NO_FATAL_FAILURE(LoadAndStep());
  world_.disk.FailReadsOf("/exp_avg/");
  ASSERT_NO_FATAL_FAILURE(Step(3));
  ASSERT_NO_FATAL_FAILURE(Create(Definition("other", 1)));
  ASSERT_NO_FATAL_FAILURE(Load());
  EXPECT_TRUE(job_->AwaitVersion(0, 0, Soon()).ok());
  EXPECT_TRUE(absl::IsDataLoss(table_->Stop(Soon().deadline)));
  world_.disk.FailReadsOf("");
  ASSERT_NO_FATAL_FAILURE(Restart());
  Use("other");
  EXPECT_FALSE(job_->leader()->HasLostMemory());
  EXPECT_TRUE(job_->AwaitVersion(0, 0, Soon()).ok());
  Use("job");
  EXPECT_TRUE(job_->leader()->HasLostMemory());
}

// A job whose stop waits for the disk delays no other job's flush.
TEST_F(JobOnAFaultyDisk, JobsStopSideBySide) {
  ASSERT_NO_FATAL_FAILURE(LoadAndStep());
  const std::shared_ptr<JobRuntime> waiting = job_;
  const int64_t generation = generation_;
  ASSERT_NO_FATAL_FAILURE(Create(Definition("other", 1)));
  ASSERT_NO_FATAL_FAILURE(Load());
  EXPECT_TRUE(job_->AwaitVersion(0, 0, Soon()).ok());
  job_ = waiting;
  generation_ = generation;
  for (const OwnedShard& shard : job_->shards().layout().shards)
    ASSERT_TRUE(Push(shard, false, Normal(kRows * kColumns, 3)).ok());
  world_.disk.FailWritesAfter(3, absl::ResourceExhaustedError("no space left on device"));
  ASSERT_TRUE(Commit().ok());
  absl::Status stopped;
  std::thread stop([&] { stopped = table_->Stop(Soon().deadline); });
  const auto end = Soon().deadline;
  while (ListFlushes(data_->store(), "other").value().empty() &&
         std::chrono::steady_clock::now() < end)
    std::this_thread::yield();
  EXPECT_TRUE(ListFlushes(data_->store(), "job").value().empty());
  world_.disk.Heal();
  for (;
       ListFlushes(data_->store(), "job").value().empty() && std::chrono::steady_clock::now() < end;
       job_->Tick())
    std::this_thread::yield();
  stop.join();
  EXPECT_TRUE(stopped.ok()) << stopped;
}
// While a write hangs, calls that do not need it are answered. Otherwise this test and the next two
// would never end.
TEST_F(JobOnAFaultyDisk, AnswersWhileTheWriteOfAnApplyHangs) {
  ASSERT_NO_FATAL_FAILURE(LoadAndStep());
  const std::vector<int32_t> order = job_->shards().NextUseOrder();
  world_.disk.HangWrites();
  ASSERT_NO_FATAL_FAILURE(Step(3));
  world_.disk.AwaitHangingWrite();
  EXPECT_EQ(job_->leader()->Status().position.committed_step, 2);
  const absl::Status repeated = Commit(/*is_load=*/false, /*step=*/2);
  EXPECT_TRUE(repeated.ok()) << repeated;
  EXPECT_TRUE(job_->shards().Describe(order.back()).ok());
  world_.disk.Heal();
  for (const int32_t shard : order) EXPECT_TRUE(job_->AwaitVersion(shard, 2, Soon()).ok());
}

TEST_F(JobOnAFaultyDisk, AnswersWhileTheWriteOfALoadHangs) {
  ASSERT_NO_FATAL_FAILURE(LoadAndStep());
  ASSERT_NO_FATAL_FAILURE(Join());  // a new attempt, for a LOAD
  world_.disk.HangWrites();
  absl::Status pushed;
  std::thread push([&] {
    for (const OwnedShard& shard : job_->shards().layout().shards)
      pushed.Update(Push(shard, /*is_load=*/true, Normal(kRows * kColumns, 4)));
  });
  world_.disk.AwaitHangingWrite();
  EXPECT_EQ(job_->leader()->Status().position.committed_step, 1);
  for (const OwnedShard& shard : job_->shards().layout().shards)
    EXPECT_TRUE(job_->AwaitVersion(shard.id, 1, Soon()).ok()) << shard.id;
  world_.disk.Heal();
  push.join();
  EXPECT_TRUE(pushed.ok()) << pushed;
  EXPECT_TRUE(Commit(/*is_load=*/true).ok());
}

TEST_F(JobOnAFaultyDisk, AnswersWhileTheLeadersRecordHangs) {
  ASSERT_NO_FATAL_FAILURE(LoadAndStep());
  data_disk_->HangWrites();
  absl::StatusOr<step::Answer> joined = absl::UnknownError("not answered");
  std::thread join([&] { joined = Ask(&LeaderShell::Join, step::JoinRequest()); });
  data_disk_->AwaitHangingWrite();
  EXPECT_EQ(job_->leader()->Status().position.committed_step, 1);
  for (const OwnedShard& shard : job_->shards().layout().shards) {
    EXPECT_TRUE(Push(shard, false, Normal(kRows * kColumns, 3)).ok()) << shard.id;
    EXPECT_TRUE(job_->AwaitVersion(shard.id, 1, Soon()).ok()) << shard.id;
  }
  data_disk_->Heal();
  join.join();
  EXPECT_TRUE(joined.ok()) << joined.status();
  EXPECT_TRUE(Commit().ok());  // a commit needs the record
}

// The disk is full when the leader writes its record. Callers wait, and the job goes on when there
// is room.
TEST_F(JobOnAFaultyDisk, FullDiskDelaysAJoin) {
  data_disk_->FailWritesAfter(0, absl::ResourceExhaustedError("no space left on device"));
  absl::Status late;  // the disk is asked while the caller waits
  for (const auto end = Soon().deadline;
       !absl::StrContains(late.message(), "no space left on device") &&
       std::chrono::steady_clock::now() < end;)
    late = Ask(&LeaderShell::Join, step::JoinRequest(),
               {std::chrono::steady_clock::now() + std::chrono::milliseconds(50), nullptr})
               .status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(late)) << late;
  EXPECT_THAT(std::string(late.message()), HasSubstr("no space left on device"));
  job_->Tick();  // tries again, and fails again
  data_disk_->Heal();
  const Ticker ticker(job_);
  ASSERT_NO_FATAL_FAILURE(Load());
}

// Each small write of a recovery is made again if it fails, once or more often.
TEST_F(JobOnAFaultyDisk, RecoveryOutlastsAFailedWrite) {
  for (int writes = 1; writes < 6; ++writes) {
    SCOPED_TRACE(writes);
    const auto job = JobRuntime::Open(environment_, Definition(absl::StrCat("new", writes), 1),
                                      /*is_new=*/true)
                         .value();
    data_disk_->FailWritesAfter(writes, absl::DataLossError("input/output error"));
    ASSERT_TRUE(job->Start().ok());
    job->Tick();
    data_disk_->Heal();
    const Ticker ticker(job);
    AwaitRecovery(job.get());
    EXPECT_TRUE(job->leader()->Status().serving);
    job->Close();
  }
}

// What the disk gives back is checked as what a peer sends: the model of this definition would
// divide by zero.
TEST_F(JobOnAFaultyDisk, StoredDefinitionThatIsNotCompleteIsQuarantined) {
  v1::JobDefinition definition = Definition();
  definition.mutable_manifest()->set_shard_elements(0);
  ASSERT_TRUE(
      data_->store().Commit({{{"job/job", definition.SerializeAsString()}}, {}, {}, {}}).ok());
  Restart();
  EXPECT_TRUE(table_->Quarantined().contains("job"));
}

}  // namespace
}  // namespace orlop::server
