// Fits y = 3 x0 - 2 x1 + 1 by gradient descent. This program computes gradients; a server keeps the
// weights and the momentum.
//   least_squares HOST:PORT
#include <array>
#include <cmath>
#include <iostream>
#include <vector>

#include "client/client.h"

namespace {

using namespace orlop;  // NOLINT: an example

constexpr int kSteps = 200;
constexpr std::array<float, 3> kTruth = {3, -2, 1};

absl::Span<const std::byte> Bytes(const std::array<float, 3>& values) {
  return absl::MakeConstSpan(reinterpret_cast<const std::byte*>(values.data()), sizeof(values));
}

// Returns the gradient of the mean square error over a grid of points.
std::array<float, 3> Gradient(const std::array<float, 3>& weights) {
  std::array<float, 3> gradient = {};
  for (int point = 0; point < 100; ++point) {
    const std::array<float, 3> x = {point % 10 / 5.0f - 1, point / 10 / 5.0f - 1, 1};
    float error = 0;
    for (int i = 0; i < 3; ++i) error += (weights[i] - kTruth[i]) * x[i];
    for (int i = 0; i < 3; ++i) gradient[i] += 2 * error * x[i] / 100;
  }
  return gradient;
}

absl::StatusOr<std::unique_ptr<client::Session>> Start(client::Client* client) {
  client::JobSpec spec{.job = "least-squares"};
  v1::TensorSpec tensor;
  tensor.set_name("weights");
  tensor.add_shape(3);
  tensor.set_dtype(v1::DTYPE_F32);
  spec.tensors.push_back(tensor);
  auto session = client->CreateJob(spec);
  if (!session.ok()) return session.status();
  v1::ConfigureOptimizerRequest optimizer;
  optimizer.add_groups()->set_optimizer("sgd");
  optimizer.mutable_groups(0)->add_tensors(0);
  if (auto changed = (*session)->ConfigureOptimizer(optimizer); !changed.ok())
    return changed.status();
  auto generation = (*session)->StartGeneration(1);
  if (!generation.ok()) return generation.status();
  client::JoinOptions join{.generation = *generation};
  join.layout.set_mode(v1::ContributionLayout::EXACTLY_ONCE);
  join.layout.set_preset(v1::ContributionLayout::WHOLE);
  if (auto joined = (*session)->Join(join); !joined.ok()) return joined.status();
  return session;
}

// Loads zero weights as step 0, unless an earlier run of this program has made steps already.
absl::Status LoadIfNew(client::Session* session) {
  if (session->state().committed_step >= 0) return absl::OkStatus();
  const std::array<float, 3> zeros = {};
  const client::PushPart part{.tensor = 0, .data = Bytes(zeros)};
  if (auto set = session->SetState({&part, 1}); !set.ok()) return set.status();
  return session->Commit({.kind = v1::CommitStepRequest::LOAD}).status();
}

absl::Status Pull(client::Session* session, std::array<float, 3>* weights) {
  const client::PullPart part{
      .tensor = 0,
      .data = absl::MakeSpan(reinterpret_cast<std::byte*>(weights->data()), sizeof(*weights))};
  return session->Pull({&part, 1}).status();
}

absl::Status Train(client::Session* session, std::array<float, 3>* weights) {
  client::CommitOptions commit;
  commit.groups.emplace_back();
  auto& values = *commit.groups[0].mutable_values();
  values["lr"] = 0.2;
  values["momentum"] = 0.5;
  values["dampening"] = values["weight_decay"] = values["nesterov"] = 0;
  if (absl::Status status = LoadIfNew(session); !status.ok()) return status;
  if (absl::Status status = Pull(session, weights); !status.ok()) return status;
  for (int step = 0; step < kSteps; ++step) {
    const std::array<float, 3> gradient = Gradient(*weights);
    const client::PushPart part{.tensor = 0, .data = Bytes(gradient)};
    if (auto pushed = session->Push({&part, 1}); !pushed.ok()) return pushed.status();
    if (auto decided = session->Commit(commit); !decided.ok()) return decided.status();
    if (absl::Status status = Pull(session, weights); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace

int main(int argc, char** argv) {
  client::ClientOptions options;
  if (argc > 1) options.server = argv[1];
  auto client = client::Client::Connect(options);
  if (!client.ok()) return std::cerr << client.status().message() << "\n", 1;
  auto session = Start(client->get());
  std::array<float, 3> weights = {};
  const absl::Status status = session.ok() ? Train(session->get(), &weights) : session.status();
  if (!status.ok()) return std::cerr << status.message() << "\n", 1;
  std::cout << "step " << (*session)->state().committed_step << ": y = " << weights[0] << " x0 + "
            << weights[1] << " x1 + " << weights[2] << "\n";
  for (int i = 0; i < 3; ++i)
    if (std::abs(weights[i] - kTruth[i]) > 1e-3f)
      return std::cerr << "not the line it should be\n", 1;
  return 0;
}
