// Many threads use the jobs of one server at once: they stage, drop and commit steps, spill slots,
// configure and delete jobs, flush, pull, and look. The thread sanitizer reports two locks that
// were taken in both orders, even if no thread has waited. So it checks the order of
// ARCHITECTURE.md, "Threads and locks". All bytes are compared with those of a job that was alone.
#include <grpcpp/grpcpp.h>
#include <stdlib.h>

#include <atomic>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <stop_token>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "base/checksum.h"
#include "base/thread_pool.h"
#include "kernels/optimizer.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "server/cluster/peer_links.h"
#include "server/durability/flush.h"
#include "server/job/job_model.h"
#include "server/job/manifest.h"
#include "server/job/slots.h"
#include "server/runtime/environment.h"
#include "server/runtime/job_table.h"
#include "server/runtime/leader_shell.h"
#include "server/runtime/wait.h"
#include "server/shards/shard_store.h"
#include "server/shards/testing/shard_fixture.h"
#include "server/step/actions.h"
#include "server/step/layout.h"
#include "server/step/leader.h"
#include "server/tiers/tier.h"
#include "storage/data_directory.h"

namespace orlop::server {
namespace {

using std::chrono::steady_clock;

constexpr uint64_t kColumns = 1000, kElements = 120 * kColumns, kShardElements = 25'600;
constexpr int64_t kSteps = 12, kReload = 5;

// Less than the slots and the staging of both jobs take, so that slots spill and come back.
constexpr uint64_t kDramBytes = 7 * kMiB / 2, kNvmeBytes = 64 * kMiB;

// How a job is trained.
struct Training {
  std::string job, optimizer;
  std::vector<double> values;  // of the optimizer's hyper-parameters
  int world_size = 1;          // each rank pushes the whole tensor
  int first_numbers = 0;       // jobs must not have the same numbers
};

const Training kFirst{"first", "adamw", {1e-3, 0.9, 0.999, 1e-8, 0.01}, 2, 0};
const Training kSecond{"second", "lamb", {1e-2, 0.9, 0.999, 1e-6, 0.01}, 1, 3};
const Training kPassing{"passing", "adamw", {1e-3, 0.9, 0.999, 1e-8, 0.01}, 1, 5};

// Steps that set the weights anew instead of updating them.
bool IsLoad(int64_t step) { return step == 0 || step == kReload; }

// The weights of LOADs and the gradients of updates.
class Numbers {
 public:
  explicit Numbers(uint32_t seed) {
    for (uint32_t i = 0; i < 7; ++i) all_.push_back(Normal(kElements, seed + i));
  }
  const std::vector<float>& Of(const Training& training, int rank, int64_t step) const {
    return all_[static_cast<size_t>(training.first_numbers + 2 * step + rank) % all_.size()];
  }

 private:
  std::vector<std::vector<float>> all_;
};

// Returns a job of one tensor. An empty `state` means that the optimizer is not configured.
v1::JobDefinition Definition(const Training& training, uint64_t revision,
                             const std::string& state = "8bit") {
  v1::JobDefinition definition;
  v1::CreateJobRequest& manifest = *definition.mutable_manifest();
  manifest.set_job(training.job);
  manifest.set_shard_elements(kShardElements);
  v1::TensorSpec& tensor = *manifest.add_tensors();
  tensor.set_name("layer.w");
  tensor.set_kind(v1::TENSOR_KIND_PARAMETER);
  tensor.set_dtype(v1::DTYPE_F32);
  tensor.add_shape(kElements / kColumns);
  tensor.add_shape(kColumns);
  EXPECT_TRUE(CompleteManifest(&manifest).ok());
  const Digest128 digest = ManifestDigest(manifest);
  definition.mutable_manifest_digest()->set_high(digest.high);
  definition.mutable_manifest_digest()->set_low(digest.low);
  definition.set_server_count(1);
  v1::PlacementRun& run = *definition.add_runs();
  run.set_shard_count(ShardCount(kElements, kShardElements));
  run.add_servers(0);
  definition.set_revision(revision);
  if (state.empty()) return definition;
  v1::OptimizerGroup& group = *definition.mutable_optimizer()->add_groups();
  group.set_optimizer(training.optimizer);
  group.set_state(state);
  group.add_tensors(0);
  return definition;
}

Wait Soon() { return {steady_clock::now() + std::chrono::minutes(5), nullptr}; }
Box Whole() { return {{0, 0}, {kElements / kColumns, kColumns}, false}; }

std::vector<uint8_t> BytesOf(const OwnedShard& shard, const std::vector<float>& values) {
  return AsBytes(
      std::vector<float>(values.begin() + shard.range.begin, values.begin() + shard.range.end));
}

// The versions of a job whose steps were made one after the other, by one thread, with memory for
// everything and without the step machines.
class Reference {
 public:
  Reference(const Training& training, const Numbers& numbers)
      : training_(training), numbers_(numbers) {
    OwnedShards layout =
        Layout({Parameter("layer.w", {kElements / kColumns, kColumns})}, kShardElements);
    layout.job = training.job;
    store_ = NewStore(&world_, layout);
    optimizers_ = JobModel::Make(Definition(training, 1)).value()->Optimizers();
    EXPECT_TRUE(store_->Configure(optimizers_).ok());
    EXPECT_TRUE(store_->SetLayout(WholeLayout(layout, training.world_size)).ok());
    for (int64_t step = 0; step <= kSteps; ++step) Make(step);
  }
  // What a read of a shard's weight as fp32 returns.
  const std::vector<uint8_t>& Weight(int64_t version, int32_t shard) const {
    return versions_[version].weights[shard];
  }
  const std::vector<uint8_t>& All(int64_t version) const { return versions_[version].all; }
  // An empty store that a flush of the job can be loaded into.
  std::unique_ptr<ShardStore> NewStoreLike(World* world) const {
    auto store = NewStore(world, store_->layout());
    EXPECT_TRUE(store->Configure(optimizers_).ok());
    return store;
  }

 private:
  struct Version {
    std::vector<uint8_t> all;
    std::vector<std::vector<uint8_t>> weights;  // by shard
  };
  void Make(int64_t step) {
    if (IsLoad(step)) {
      LoadTensor(store_.get(), 0, numbers_.Of(training_, 0, step));
      CommitLoad(store_.get(), step);
    } else {
      for (int rank = 0; rank < training_.world_size; ++rank)
        PushTensor(store_.get(), 0, rank, numbers_.Of(training_, rank, step));
      Update(step);
    }
    Version version{AllBytes(store_.get(), step), {}};
    for (const OwnedShard& shard : store_->layout().shards)
      version.weights.push_back(
          Read(store_.get(), {shard.id, Slot::kWeight, v1::DTYPE_F32, Whole(), step}));
    versions_.push_back(std::move(version));
  }
  // The gradient of a step is the mean over the ranks.
  void Update(int64_t step) {
    const kernels::Optimizer& optimizer = *kernels::FindOptimizer(training_.optimizer);
    ShardUpdate update{ShardUpdate::Kind::kApply, step};
    update.scalars = optimizer.Prepare(training_.values, update_count_++,
                                       1.0f / static_cast<float>(training_.world_size));
    for (const OwnedShard& shard : store_->layout().shards)
      ASSERT_TRUE(StageGradient(store_, shard.id).ok());
    if (optimizer.scope != kernels::Scope::kElement) update.pass = *store_->RunPass(0, update);
    for (const OwnedShard& shard : store_->layout().shards) {
      const absl::Status applied = store_->Apply(shard.id, update);
      ASSERT_TRUE(applied.ok()) << applied;
    }
  }

  const Training& training_;
  const Numbers& numbers_;
  World world_;
  std::unique_ptr<ShardStore> store_;
  std::vector<TensorOptimizer> optimizers_;
  int64_t update_count_ = 0;
  std::vector<Version> versions_;
};

// One worker of a job, with a thread of its own.
class Rank {
 public:
  Rank(std::shared_ptr<JobRuntime> job, const Training& training, int rank, const Numbers& numbers,
       uint64_t seed)
      : job_(std::move(job)), training_(training), rank_(rank), numbers_(numbers), random_(seed) {}

  static absl::StatusOr<int64_t> NewGeneration(JobRuntime* job) {
    step::JoinRequest join;
    const auto answer = Ask(job, &LeaderShell::Join, join);
    if (!answer.ok()) return answer.status();
    return answer->generation_issued;
  }
  absl::Status Join(int64_t generation) {
    generation_ = generation;
    step::JoinRequest join;
    join.rank = rank_;
    join.world_size = training_.world_size;
    join.generation = generation;
    join.contributions = {{0, step::Mode::kSum, {Whole()}}};
    return Ask(job_.get(), &LeaderShell::Join, join).status();
  }
  // Makes the next step, as often as its attempts are dropped. Rank 0 drops some half-way.
  absl::Status Make(int64_t step) {
    const Wait wait = Soon();
    for (int drops = rank_ == 0 ? static_cast<int>(random_() % 3) : 0;; --drops) {
      const int64_t attempt = job_->leader()->Status().position.attempt;
      if (drops > 0) {
        Drop(step, attempt);
        continue;
      }
      absl::Status made = Push(step, attempt, IsLoad(step), job_->shards().layout().shards.size());
      if (made.ok()) made = Commit(step, attempt);
      if (made.ok() || !MayTryAgain(made) || wait.is_over()) return made;
    }
  }

 private:
  static bool MayTryAgain(const absl::Status& status) {
    return absl::IsAborted(status) || absl::IsUnavailable(status) ||
           absl::IsFailedPrecondition(status) || absl::IsResourceExhausted(status);
  }
  // Asks the leader, and waits for its answer.
  template <typename Request>
  static absl::StatusOr<step::Answer> Ask(JobRuntime* job,
                                          step::RequestId (LeaderShell::*call)(const Request&,
                                                                               Caller),
                                          const Request& request) {
    LeaderShell& leader = *job->leader();
    return leader.Await(Soon(),
                        [&](Caller caller) { return (leader.*call)(request, std::move(caller)); });
  }

  // Stages some pieces, gradients or weights, and drops their attempt. Other ranks may have pushed
  // the other kind, so a piece may be refused.
  void Drop(int64_t step, int64_t attempt) {
    const size_t count = 1 + random_() % job_->shards().layout().shards.size();
    (void)Push(step, attempt, /*is_load=*/random_() % 2 == 0, count);
    step::AbortRequest abort;
    abort.generation = generation_;
    abort.step = step;
    abort.attempt = attempt;
    const absl::Status dropped = Ask(job_.get(), &LeaderShell::Abort, abort).status();
    EXPECT_TRUE(dropped.ok() || MayTryAgain(dropped)) << dropped;
  }
  // Pushes the pieces of the first `count` shards. Rank 0 alone sets weights.
  absl::Status Push(int64_t step, int64_t attempt, bool is_load, size_t count) {
    if (is_load && rank_ > 0) return absl::OkStatus();
    for (const OwnedShard& shard : job_->shards().layout().shards) {
      if (count-- == 0) break;
      PieceRequest request;
      request.key = {0, generation_, step, attempt};
      request.rank = rank_;
      request.shard = shard.id;
      request.box = is_load ? Flat(shard.range.begin, shard.range.count()) : Whole();
      request.dtype = v1::DTYPE_F32;
      request.is_load = is_load;
      if (absl::Status pushed = PushPiece(request, shard, step); !pushed.ok()) return pushed;
    }
    return absl::OkStatus();
  }
  absl::Status PushPiece(const PieceRequest& request, const OwnedShard& shard, int64_t step) {
    BegunPiece begun = AskUntilAnswered(
        Soon(), [&](const auto& wakeup) { return job_->BeginPiece(request, wakeup); });
    if (!begun.ticket.has_value()) return begun.status;
    const auto bytes = BytesOf(shard, numbers_.Of(training_, rank_, step));
    const absl::Span<const uint8_t> slices[] = {bytes};
    const uint64_t checksum =
        ChunkChecksum(LeafHashes({reinterpret_cast<const char*>(bytes.data()), bytes.size()}));
    absl::Status sent = begun.ticket->writer->WriteChunk(0, slices, checksum);
    if (!sent.ok()) return sent;
    return job_->EndPiece(*std::move(begun.ticket), DigestOfBytes(bytes), Soon()).status();
  }
  absl::Status Commit(int64_t step, int64_t attempt) {
    step::CommitRequest commit;
    commit.rank = rank_;
    commit.generation = generation_;
    commit.step = step;
    commit.attempt = attempt;
    commit.is_load = IsLoad(step);
    if (!commit.is_load) {
      commit.groups.emplace_back();
      for (const double value : training_.values)
        commit.groups[0].values.push_back({"value", std::bit_cast<uint64_t>(value)});
    }
    return Ask(job_.get(), &LeaderShell::Commit, commit).status();
  }

  const std::shared_ptr<JobRuntime> job_;
  const Training& training_;
  const int rank_;
  const Numbers& numbers_;
  std::mt19937_64 random_;
  int64_t generation_ = 0;
};

// One server, and what its threads do to its jobs.
class LockOrder : public testing::Test {
 protected:
  void SetUp() override {
    std::printf("seed %u\n", seed_);
    std::fflush(stdout);  // the sanitizer ends the process
    char pattern[] = "/tmp/orlop-job-XXXXXX";
    directory_ = mkdtemp(pattern);
    data_ = storage::DataDirectory::Open({directory_, "self", 32 << 20, nullptr}).value();
    pool_ = std::make_unique<ThreadPool>(3);
    peers_ = std::make_unique<PeerLinks>(std::vector<PeerAddress>{{"self", "127.0.0.1:1"}},
                                         grpc::InsecureChannelCredentials());
    table_ = std::make_unique<JobTable>(
        Environment{{"self"}, 0, data_.get(), world_.tiers.get(), pool_.get(), peers_.get(), [] {
                      return v1::ServerInfo();
                    }});
    ASSERT_TRUE(table_->OpenAll().ok());
  }
  void TearDown() override {
    for (const auto& job : table_->List()) job->Close();
    pool_->Stop();
    table_.reset();
    peers_.reset();
    data_.reset();
    std::filesystem::remove_all(directory_);
  }

  absl::StatusOr<std::shared_ptr<JobRuntime>> Create(const v1::JobDefinition& definition) {
    if (absl::Status put = table_->Put(definition); !put.ok()) return put;
    auto job = table_->Find(definition.manifest().job());
    if (!job.ok()) return job.status();
    LeaderShell& leader = *(*job)->leader();
    const auto recovered = leader.Await(
        Soon(), [&](Caller caller) { return leader.AwaitRecovery(std::move(caller)); });
    if (!recovered.ok()) return recovered.status();
    return job;
  }
  // Returns the ranks of a job, joined.
  std::vector<std::shared_ptr<Rank>> Join(const std::shared_ptr<JobRuntime>& job,
                                          const Training& training) {
    const int64_t generation = Rank::NewGeneration(job.get()).value();
    std::vector<std::shared_ptr<Rank>> ranks;
    std::vector<std::jthread> joins;
    for (int rank = 0; rank < training.world_size; ++rank) {
      ranks.push_back(std::make_shared<Rank>(job, training, rank, numbers_, seed_ + rank));
      joins.emplace_back([rank = ranks.back(), generation] {
        const absl::Status joined = rank->Join(generation);
        EXPECT_TRUE(joined.ok()) << joined;
      });
    }
    return ranks;
  }
  // Starts a thread for each rank, which makes all steps.
  static void Train(std::vector<std::shared_ptr<Rank>> ranks, std::vector<std::jthread>* threads) {
    for (std::shared_ptr<Rank>& rank : ranks)
      threads->emplace_back([rank = std::move(rank)] {
        for (int64_t step = 0; step <= kSteps; ++step) {
          const absl::Status made = rank->Make(step);
          ASSERT_TRUE(made.ok()) << "step " << step << ": " << made;
        }
      });
  }
  // Starts a thread that calls `act` until the jobs are trained and it has returned true thrice.
  void Repeat(std::function<bool(std::mt19937_64*)> act) {
    helpers_.emplace_back([this, act = std::move(act), seed = seed_ + helpers_.size()] {
      std::mt19937_64 random(seed);
      std::optional<Wait> wait;  // when the others have done their work
      for (int count = 0; (!is_trained_ || count < 3) && !HasFailure();) {
        if (is_trained_ && !wait) wait = Soon();
        ASSERT_FALSE(wait && wait->is_over()) << "an action of a helper never succeeds";
        if (act(&random))
          ++count;
        else
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    });
  }

  // Creates a job, configures it twice, loads it, and deletes it. Configures a job that steps.
  bool CreateAndDelete(std::mt19937_64* random) {
    ++revision_;
    const absl::Status again = table_->Put(Definition(kFirst, revision_));
    EXPECT_TRUE(again.ok()) << again;
    absl::Status made = Pass(random);
    EXPECT_TRUE(made.ok() || absl::IsResourceExhausted(made)) << made;
    bool existed = false;
    const absl::Status dropped = table_->Drop(kPassing.job, &existed);
    EXPECT_TRUE(dropped.ok()) << dropped;
    return made.ok() && existed;
  }
  absl::Status Pass(std::mt19937_64* random) {
    const auto job = Create(Definition(kPassing, 1, ""));
    if (!job.ok()) return job.status();
    for (const auto& [revision, state] : {std::pair(2, "fp32"), std::pair(3, "8bit")})
      if (absl::Status put = table_->Put(Definition(kPassing, revision, state)); !put.ok())
        return put;
    const auto generation = Rank::NewGeneration(job->get());
    if (!generation.ok()) return generation.status();
    Rank worker(*job, kPassing, 0, numbers_, (*random)());
    if (absl::Status joined = worker.Join(*generation); !joined.ok()) return joined;
    return (*random)() % 2 == 0 ? worker.Make(0) : absl::OkStatus();
  }
  // Takes memory, so that slots spill, gives it back, and brings slots back.
  bool Spill(std::mt19937_64* random) {
    const Use use{Tier::kDram, "other", "weight"};
    auto taken = world_.tiers->Reserve(use, kDramBytes / 8 + (*random)() % (kDramBytes / 4));
    const bool is_taken = taken.ok();
    std::this_thread::yield();
    taken = absl::CancelledError("given back");
    if ((*random)() % 2 == 0)
      world_.tiers->BringBack(steady_clock::now() + std::chrono::minutes(1));
    return is_taken;
  }
  // Reads what ServerStatus, ListJobs and DescribeTensor return.
  bool Look(std::mt19937_64*) {
    uint64_t bytes = 0;
    for (const UsedBytes& used : world_.accountant.Snapshot()) bytes += used.used_bytes;
    bytes += world_.accountant.peak_bytes(Tier::kDram) + data_->FreeBytes().value_or(0);
    for (const std::shared_ptr<JobRuntime>& job : table_->List()) {
      bytes += job->missing_flush_bytes() + job->model()->parameter_count();
      const int64_t last_step = job->last_step().step;  // first: the job goes on
      const step::JobStatusReport report = job->leader()->Status();
      EXPECT_TRUE(!job->leader()->HasLostMemory() && job->refusals().empty());
      EXPECT_LE(last_step, report.position.committed_step);
      EXPECT_LE(report.applied_step, report.position.committed_step);
      size_t expected = 0;
      if (job->layout() != nullptr) (void)job->PiecesFrom(0, &expected);
      EXPECT_LE(expected, job->shards().layout().shards.size());
      EXPECT_LE(job->AppliedCount(0), kSteps);
      for (const OwnedShard& shard : job->shards().layout().shards) {
        const ShardStatus status = job->shards().Describe(shard.id).value();
        for (const SlotStatus& slot : status.slots)
          if (slot.tier == Tier::kNvme) saw_spilled_ = true;
      }
    }
    return bytes > 0;
  }
  // Pulls one shard at the newest version, and compares it.
  bool Pull(JobRuntime* job, const Reference& reference, std::mt19937_64* random) {
    const auto shard = static_cast<int32_t>((*random)() % job->shards().layout().shards.size());
    const int64_t version = job->position().committed_step;
    if (version < 0) return false;
    std::unique_ptr<ShardReader> reader;
    {
      const auto pin = job->AwaitVersion(shard, version, Soon());
      if (!pin.ok()) return false;  // a later step was applied
      auto opened =
          job->shards().OpenRead({shard, Slot::kWeight, v1::DTYPE_F32, Whole(), version, kMiB});
      if (!opened.ok()) return false;
      reader = *std::move(opened);
    }
    std::vector<uint8_t> bytes;
    while (!reader->done()) {
      const auto chunk = reader->Next();
      if (absl::IsResourceExhausted(chunk.status())) return false;
      EXPECT_TRUE(chunk.ok()) << chunk.status();
      if (!chunk.ok()) return false;
      bytes.insert(bytes.end(), chunk->bytes.begin(), chunk->bytes.end());
    }
    EXPECT_TRUE(bytes == reference.Weight(version, shard))
        << "shard " << shard << " version " << version << " of a job that steps";
    return true;
  }
  // Writes a flush while the job steps, loads it elsewhere, and compares it.
  bool Flush(JobRuntime* job, const Reference& reference) {
    LeaderShell& leader = *job->leader();
    const auto flushed =
        leader.Await(Soon(), [&](Caller caller) { return leader.Flush(std::move(caller)); });
    if (!flushed.ok()) return false;  // the first LOAD is not committed
    const int64_t step = flushed->position.committed_step;
    World world;
    const auto store = reference.NewStoreLike(&world);
    const absl::Status loaded =
        LoadFlush(data_->store(), store->layout().job, step, /*with_staged=*/false, store.get());
    EXPECT_TRUE(loaded.ok()) << loaded;
    if (loaded.ok()) {
      EXPECT_TRUE(AllBytes(store.get(), step) == reference.All(step)) << "flush of step " << step;
    }
    return loaded.ok();
  }
  void ExpectAll(JobRuntime* job, const Reference& reference) {
    for (const OwnedShard& shard : job->shards().layout().shards)
      ASSERT_TRUE(job->AwaitVersion(shard.id, kSteps, Soon()).ok());
    EXPECT_TRUE(AllBytes(&job->shards(), kSteps) == reference.All(kSteps)) << job->model()->job();
  }

  const uint32_t seed_ = std::random_device()();
  const Numbers numbers_{seed_};
  World world_{kDramBytes, kNvmeBytes};
  std::string directory_;
  std::unique_ptr<storage::DataDirectory> data_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<PeerLinks> peers_;
  std::unique_ptr<JobTable> table_;
  std::vector<std::jthread> helpers_;
  std::atomic<bool> is_trained_ = false;
  std::atomic<bool> saw_spilled_ = false;
  uint64_t revision_ = 1;  // of the first job
};

TEST_F(LockOrder, OfStepsSpillsConfigurationsFlushesAndLooksAtOnce) {
  const Reference first(kFirst, numbers_), second(kSecond, numbers_);
  auto one = Create(Definition(kFirst, 1)).value(), two = Create(Definition(kSecond, 1)).value();
  auto first_ranks = Join(one, kFirst), second_ranks = Join(two, kSecond);
  std::vector<std::jthread> training;
  Train(std::move(first_ranks), &training);
  Train(std::move(second_ranks), &training);
  Repeat([&](auto* random) { return CreateAndDelete(random); });
  Repeat([&](auto* random) { return Spill(random); });
  Repeat([&](auto* random) { return Look(random); });
  Repeat([&](auto* random) { return Pull(one.get(), first, random); });
  Repeat([&](auto* random) { return Pull(two.get(), second, random); });
  Repeat([&](auto*) { return Flush(one.get(), first); });
  Repeat([&](auto*) { return Flush(two.get(), second); });
  std::jthread ticker([this](const std::stop_token& stop) {
    for (; !stop.stop_requested(); std::this_thread::sleep_for(std::chrono::milliseconds(5)))
      table_->Tick();
  });
  training.clear();
  is_trained_ = true;
  helpers_.clear();
  ticker = {};
  ExpectAll(one.get(), first);
  ExpectAll(two.get(), second);
  EXPECT_TRUE(saw_spilled_) << "nothing spills: the budget of this test is too large";
  EXPECT_LE(world_.accountant.peak_bytes(Tier::kDram), kDramBytes);
  bool existed = false;
  EXPECT_TRUE(table_->Drop(kFirst.job, &existed).ok());
  EXPECT_TRUE(table_->Drop(kSecond.job, &existed).ok());
  one.reset();
  two.reset();
  pool_->Stop();
  EXPECT_EQ(world_.accountant.reserved_bytes(Tier::kDram), 0u);
  EXPECT_EQ(world_.accountant.reserved_bytes(Tier::kNvme), 0u);
}

}  // namespace
}  // namespace orlop::server
