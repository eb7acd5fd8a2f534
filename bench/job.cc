#include "bench/job.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "bench/processes.h"
#include "client/client.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/types.pb.h"

namespace orlop::bench {
namespace {

constexpr uint64_t kTensorBytes = BenchJob::kTensorElements * 2;

// Fills with random bf16 numbers, finite, of both signs, between 2^-7 and 2^-3.
void FillRandom(std::vector<char>* bytes, uint32_t seed) {
  std::mt19937_64 random(seed);
  for (size_t i = 0; i < bytes->size(); i += 8) {
    const uint64_t four = (random() & 0x81FF'81FF'81FF'81FF) | 0x3C00'3C00'3C00'3C00;
    std::memcpy(bytes->data() + i, &four, 8);
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<BenchJob>> BenchJob::Create(int servers, uint64_t bytes,
                                                           const std::string& memory,
                                                           const std::string& data_dir) {
  std::unique_ptr<BenchJob> job(new BenchJob());
  auto started = PrivateServers::Start(servers, memory, data_dir);
  if (!started.ok()) return started.status();
  job->servers_ = *std::move(started);
  auto client = client::Client::Connect({.server = job->servers_->address()});
  if (!client.ok()) return client.status();
  job->client_ = *std::move(client);
  const uint64_t tensors = (bytes + kTensorBytes - 1) / kTensorBytes;
  client::JobSpec spec{.job = kName, .durability = v1::DURABILITY_MEMORY};
  for (uint64_t i = 0; i < tensors; ++i) {
    v1::TensorSpec tensor;
    tensor.set_name(absl::StrCat("layer.", i, ".weight"));
    tensor.add_shape(kTensorElements / 1024);
    tensor.add_shape(1024);
    tensor.set_dtype(v1::DTYPE_BF16);
    spec.tensors.push_back(tensor);
  }
  auto session = job->client_->CreateJob(spec);
  if (!session.ok()) return session.status();
  job->session_ = *std::move(session);
  job->gradients_.resize(tensors * kTensorBytes);
  job->weights_.resize(tensors * kTensorBytes);
  FillRandom(&job->gradients_, 1);
  FillRandom(&job->weights_, 2);
  for (uint32_t i = 0; i < tensors; ++i)
    job->pulls_.push_back(
        {.tensor = i,
         .data = absl::MakeSpan(reinterpret_cast<std::byte*>(&job->weights_[i * kTensorBytes]),
                                kTensorBytes)});
  if (absl::Status status = job->Configure(); !status.ok()) return status;
  return job;
}

absl::Status BenchJob::Configure() {
  v1::ConfigureOptimizerRequest optimizer;
  v1::OptimizerGroup* group = optimizer.add_groups();
  group->set_optimizer("adamw");
  for (uint32_t i = 0; i < pulls_.size(); ++i) group->add_tensors(i);
  if (auto changed = session_->ConfigureOptimizer(optimizer); !changed.ok())
    return changed.status();
  const auto generation = session_->StartGeneration(1);
  if (!generation.ok()) return generation.status();
  client::JoinOptions join{.generation = *generation};
  join.layout.set_mode(v1::ContributionLayout::EXACTLY_ONCE);
  join.layout.set_preset(v1::ContributionLayout::WHOLE);
  if (auto state = session_->Join(join); !state.ok()) return state.status();
  if (auto sent = session_->SetState(PushParts(weights_)); !sent.ok()) return sent.status();
  if (auto loaded = session_->Commit({.kind = v1::CommitStepRequest::LOAD}); !loaded.ok())
    return loaded.status();
  std::vector<char> expected = weights_;
  if (absl::Status status = Pull(); !status.ok()) return status;
  return weights_ == expected ? absl::OkStatus()
                              : absl::DataLossError("weights pulled differ from those loaded");
}

std::vector<client::PushPart> BenchJob::PushParts(const std::vector<char>& from) const {
  std::vector<client::PushPart> parts;
  parts.reserve(pulls_.size());
  for (uint32_t i = 0; i < pulls_.size(); ++i)
    parts.push_back(
        {.tensor = i,
         .data = absl::MakeSpan(reinterpret_cast<const std::byte*>(&from[i * kTensorBytes]),
                                kTensorBytes)});
  return parts;
}

absl::Status BenchJob::Push() { return session_->Push(PushParts(gradients_)).status(); }

absl::Status BenchJob::Pull() { return session_->Pull(pulls_).status(); }

absl::Status BenchJob::Commit() {
  client::CommitOptions options;
  auto& values = *options.groups.emplace_back().mutable_values();
  values["lr"] = 1e-3;
  values["beta1"] = 0.9;
  values["beta2"] = 0.999;
  values["eps"] = 1e-8;
  values["weight_decay"] = 0.01;
  const auto committed = session_->Commit(options);
  if (!committed.ok()) return committed.status();
  return committed->outcome() == v1::CommitStepResponse::APPLY
             ? absl::OkStatus()
             : absl::DataLossError("a step of finite gradients was not applied");
}

}  // namespace orlop::bench
