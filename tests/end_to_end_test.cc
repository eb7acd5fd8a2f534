// Makes one step on real orlopd processes: a LOAD, then a push, a commit and a pull, by calls of
// the generated gRPC stubs alone. The weights must equal those of a direct call of the kernels.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "base/box.h"
#include "base/checksum.h"
#include "kernels/casts.h"
#include "kernels/optimizer.h"
#include "kernels/reduce.h"
#include "kernels/types.h"
#include "orlop/v1/data.grpc.pb.h"
#include "orlop/v1/data.pb.h"
#include "orlop/v1/job.grpc.pb.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/types.pb.h"

namespace orlop {
namespace {

// The job has one tensor, "w", of ten shards; the last shard is short.
constexpr uint64_t kElements = 10'000, kShardElements = 1024;

// A Cluster runs orlopd processes that listen on Unix sockets in a temporary directory. The
// destructor stops them cleanly and removes the directory.
class Cluster {
 public:
  explicit Cluster(int server_count) {
    char pattern[] = "/tmp/orlop_e2e_XXXXXX";
    directory_ = mkdtemp(pattern);
    for (int i = 0; i < server_count; ++i) {
      names_.push_back("s" + std::to_string(i));
      peers_ += (i > 0 ? "," : "") + names_.back() + "=" + Address(i);
    }
    for (int i = 0; i < server_count; ++i) Start(i);
  }
  ~Cluster() {
    // A clean stop lets a sanitizer print its report.
    for (pid_t pid : pids_) kill(pid, SIGTERM);
    for (pid_t pid : pids_) {
      int status = 0;
      waitpid(pid, &status, 0);
      EXPECT_EQ(status, 0) << "orlopd did not end cleanly";
    }
    std::filesystem::remove_all(directory_);
  }
  std::string Address(int i) const { return "unix:" + directory_ + "/s" + std::to_string(i); }

 private:
  // Starts server `i` and waits until it prints "ready". A server whose data directory is empty
  // does not wait for the other servers, so they are started one after another.
  void Start(int i) {
    std::vector<std::string> words = {ORLOP_BIN_DIR "/orlopd",
                                      "--listen",
                                      Address(i),
                                      "--name",
                                      names_[i],
                                      "--peers",
                                      peers_,
                                      "--data-dir",
                                      directory_ + "/data" + std::to_string(i),
                                      "--memory",
                                      "256MiB",
                                      "--log-level",
                                      "error",
                                      "--parent-pid",
                                      std::to_string(getpid())};
    std::vector<char*> argv;
    argv.reserve(words.size() + 1);
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    int out[2];
    ASSERT_EQ(pipe(out), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
    posix_spawn_file_actions_addclose(&actions, out[0]);
    pid_t pid = 0;
    ASSERT_EQ(posix_spawn(&pid, argv[0], &actions, nullptr, argv.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    pids_.push_back(pid);
    close(out[1]);
    char line[6] = {};
    ASSERT_EQ(read(out[0], line, 5), 5) << "orlopd ended before it was ready";
    ASSERT_STREQ(line, "ready");
    close(out[0]);
  }

  std::string directory_, peers_;
  std::vector<std::string> names_;
  std::vector<pid_t> pids_;
};

// Returns the only chunk of the piece that covers a whole shard. `values` are those of the whole
// tensor. A shard is smaller than one leaf (1 MiB), so the chunk has one checksum.
v1::Chunk ChunkOf(uint64_t shard, const std::vector<float>& values, const std::string& slot) {
  const Range range = ShardRange(shard, kElements, kShardElements);
  v1::Chunk chunk;
  chunk.mutable_region()->set_tensor("w");
  chunk.mutable_region()->set_slot(slot);
  chunk.mutable_region()->set_dtype(v1::DTYPE_F32);
  chunk.mutable_region()->set_shard(shard);
  chunk.set_payload(values.data() + range.begin, range.count() * sizeof(float));
  const uint64_t leaf = Checksum64(chunk.payload().data(), chunk.payload().size());
  chunk.set_checksum(leaf);
  PieceDigest digest;
  digest.AddLeaves({&leaf, 1});
  chunk.mutable_piece_digest()->set_high(digest.Finish().high);
  chunk.mutable_piece_digest()->set_low(digest.Finish().low);
  return chunk;
}

// A Worker is the only contributor of the job. It calls the generated stubs itself and uses
// no code of client/.
class Worker {
 public:
  explicit Worker(const Cluster& cluster, int server_count) {
    for (int i = 0; i < server_count; ++i) {
      channels_.push_back(
          grpc::CreateChannel(cluster.Address(i), grpc::InsecureChannelCredentials()));
    }
    job_ = v1::Job::NewStub(channels_[0]);  // the step leader: its name sorts first
  }

  // Creates the job with AdamW in fp32 and clipping to norm 1, and joins it as rank 0 of 1.
  void CreateAndJoin() {
    v1::CreateJobRequest create;
    create.set_job("job");
    create.set_shard_elements(kShardElements);
    v1::TensorSpec* tensor = create.add_tensors();
    tensor->set_name("w");
    tensor->add_shape(kElements);
    tensor->set_dtype(v1::DTYPE_F32);
    v1::CreateJobResponse created;
    Check([&](auto* context) { return job_->CreateJob(context, create, &created); });
    v1::ConfigureOptimizerRequest configure;
    configure.set_job("job");
    configure.set_max_norm(1);
    configure.add_groups()->set_optimizer("adamw");
    configure.mutable_groups(0)->set_state("fp32");
    configure.mutable_groups(0)->add_tensors(0);
    v1::ConfigureOptimizerResponse configured;
    Check([&](auto* context) { return job_->ConfigureOptimizer(context, configure, &configured); });
    v1::JoinRequest join;
    join.set_job("job");
    join.set_world_size(1);
    join.set_client_id("test");
    // Rank 0 joins twice: the first call asks for a new generation, the second joins it.
    Check([&](auto* context) { return job_->Join(context, join, &joined_); });
    join.set_generation(joined_.generation());
    join.mutable_layout()->set_preset(v1::ContributionLayout::WHOLE);
    Check([&](auto* context) { return job_->Join(context, join, &joined_); });
    attempt_ = joined_.attempt();
  }

  // Sends each server the pieces of its shards in one stream: gradients of `step` by Push, or fp32
  // master weights by SetState if `is_load`.
  void Send(int64_t step, const std::vector<float>& values, bool is_load) {
    for (int server = 0; server < static_cast<int>(channels_.size()); ++server) {
      auto data = v1::Data::NewStub(channels_[server]);
      grpc::ClientContext context;
      v1::PushResponse response;
      auto stream = is_load ? data->SetState(&context, &response) : data->Push(&context, &response);
      v1::Chunk first;
      first.mutable_key()->set_job("job");
      first.mutable_key()->set_generation(joined_.generation());
      first.mutable_key()->set_step(step);
      first.mutable_key()->set_attempt(attempt_);
      ASSERT_TRUE(stream->Write(first));
      uint64_t sent = 0;
      for (uint64_t shard : ShardsOf(server))
        sent += stream->Write(ChunkOf(shard, values, is_load ? "master" : ""));
      stream->WritesDone();
      const grpc::Status status = stream->Finish();
      ASSERT_TRUE(status.ok()) << status.error_message();
      EXPECT_EQ(response.piece_count(), sent);
    }
  }

  // Commits `step` and waits for the outcome. Later calls use the attempt that the answer names.
  v1::CommitStepResponse Commit(int64_t step, bool is_load) {
    v1::CommitStepRequest commit;
    commit.set_job("job");
    commit.set_generation(joined_.generation());
    commit.set_step(step);
    commit.set_attempt(attempt_);
    commit.set_kind(is_load ? v1::CommitStepRequest::LOAD : v1::CommitStepRequest::STEP);
    if (!is_load) {
      auto& values = *commit.add_groups()->mutable_values();
      values["lr"] = values["weight_decay"] = 0.01;
      values["beta1"] = 0.9;
      values["beta2"] = 0.999;
      values["eps"] = 1e-8;
    }
    v1::CommitStepResponse response;
    Check([&](auto* context) { return job_->CommitStep(context, commit, &response); });
    attempt_ = response.next_attempt();
    return response;
  }

  // Returns the fp32 master weights of one version. An element that no server sends is NaN, which
  // equals nothing.
  std::vector<float> Pull(int64_t version) {
    std::vector<float> values(kElements, NAN);
    for (int server = 0; server < static_cast<int>(channels_.size()); ++server) {
      if (ShardsOf(server).empty()) continue;
      auto data = v1::Data::NewStub(channels_[server]);
      grpc::ClientContext context;
      v1::PullRequest request;
      request.set_job("job");
      request.set_version(version);
      request.add_regions()->set_tensor("w");
      request.mutable_regions(0)->set_slot("master");
      auto stream = data->Pull(&context, request);
      for (v1::Chunk chunk; stream->Read(&chunk);) {
        EXPECT_EQ(chunk.checksum(), Checksum64(chunk.payload().data(), chunk.payload().size()));
        std::memcpy(values.data() + chunk.region().shard() * kShardElements, chunk.payload().data(),
                    chunk.payload().size());
      }
      const grpc::Status status = stream->Finish();
      EXPECT_TRUE(status.ok()) << status.error_message();
    }
    return values;
  }

 private:
  // Makes a call and expects OK within 30 s.
  template <typename Call>
  void Check(const Call& call) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    const grpc::Status status = call(&context);
    ASSERT_TRUE(status.ok()) << status.error_message();
  }

  // Returns the indexes of the shards that a server owns.
  std::vector<uint64_t> ShardsOf(int server) const {
    std::vector<uint64_t> shards;
    for (const v1::PlacementRun& run : joined_.placement().runs()) {
      for (uint64_t s = 0; s < run.shard_count(); ++s) {
        if (static_cast<int>(run.servers(0)) == server) shards.push_back(run.first_shard() + s);
      }
    }
    return shards;
  }

  std::vector<std::shared_ptr<grpc::Channel>> channels_;
  std::unique_ptr<v1::Job::Stub> job_;
  v1::JoinResponse joined_;
  uint32_t attempt_ = 0;
};

// Returns kElements normally distributed values.
std::vector<float> Normal(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(kElements);
  for (float& value : values) value = normal(random);
  return values;
}

// Returns the fp32 master weights after the step that the servers make, computed by the kernels
// alone on the whole tensor. The squared norm is summed up as the servers do it: shard by shard, in
// ascending order.
std::vector<float> StepByKernels(const std::vector<float>& weights,
                                 const std::vector<float>& gradient) {
  double sum_squares = 0;
  for (uint64_t s = 0; s < ShardCount(kElements, kShardElements); ++s) {
    const Range range = ShardRange(s, kElements, kShardElements);
    kernels::BlockSums sums;
    kernels::ReduceGradient({kernels::DType::kF32, gradient.data() + range.begin, range.count()},
                            &sums);
    sum_squares += sums.sum_squares;
  }
  const float scale = kernels::PrepareGradientScale(sum_squares, 1, 1, 1.0).factor;
  const kernels::Optimizer* adamw = kernels::FindOptimizer("adamw");
  const kernels::StepScalars scalars = adamw->Prepare({{0.01, 0.9, 0.999, 1e-8, 0.01}}, 0, scale);
  std::vector<uint16_t> weight(kElements);
  std::vector<int16_t> remainder(kElements);
  std::vector<float> exp_avg(kElements), exp_avg_sq(kElements), master(kElements);
  EXPECT_TRUE(
      kernels::SplitMaster(weights, absl::MakeSpan(weight), absl::MakeSpan(remainder)).ok());
  kernels::RangeStep range;
  range.optimizer = adamw;
  range.scalars = scalars.span();
  range.gradient = {kernels::DType::kF32, gradient.data(), kElements};
  range.weight = range.new_weight = weight.data();
  range.remainder = remainder.data();
  range.states[0] = {exp_avg.data()};
  range.states[1] = {exp_avg_sq.data()};
  EXPECT_TRUE(kernels::Step(range).ok());
  EXPECT_TRUE(kernels::JoinMaster(weight, remainder, absl::MakeSpan(master)).ok());
  return master;
}

class EndToEnd : public ::testing::TestWithParam<int> {};

TEST_P(EndToEnd, PushedStepEqualsTheKernelsBitForBit) {
  Cluster cluster(GetParam());
  Worker worker(cluster, GetParam());
  const std::vector<float> weights = Normal(1), gradient = Normal(2);
  worker.CreateAndJoin();
  worker.Send(0, weights, /*is_load=*/true);
  EXPECT_EQ(worker.Commit(0, /*is_load=*/true).outcome(), v1::CommitStepResponse::LOADED);
  EXPECT_EQ(worker.Pull(0), weights);
  worker.Send(1, gradient, /*is_load=*/false);
  const v1::CommitStepResponse committed = worker.Commit(1, /*is_load=*/false);
  EXPECT_EQ(committed.outcome(), v1::CommitStepResponse::APPLY);
  EXPECT_GT(committed.gradient_norm(), 1);  // so the gradient is clipped
  EXPECT_EQ(worker.Pull(1), StepByKernels(weights, gradient));
}

INSTANTIATE_TEST_SUITE_P(Servers, EndToEnd, ::testing::Values(1, 2, 3));

}  // namespace
}  // namespace orlop
