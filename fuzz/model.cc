#include "fuzz/model.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fuzz/target.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/convert.h"
#include "server/job/definition.h"
#include "server/job/job_model.h"
#include "server/job/manifest.h"
#include "server/job/step_codec.h"
#include "server/step/job.h"

namespace orlop::fuzz {
namespace {

void AddTensor(v1::CreateJobRequest* manifest, const std::string& name, v1::TensorKind kind,
               v1::DType dtype, const std::vector<uint64_t>& shape) {
  v1::TensorSpec& tensor = *manifest->add_tensors();
  tensor.set_name(name);
  tensor.set_kind(kind);
  tensor.set_dtype(dtype);
  tensor.mutable_shape()->Assign(shape.begin(), shape.end());
}

void AddRun(v1::JobDefinition* definition, uint32_t tensor, uint64_t first, uint64_t count,
            uint32_t owner) {
  v1::PlacementRun& run = *definition->add_runs();
  run.set_tensor(tensor);
  run.set_first_shard(first);
  run.set_shard_count(count);
  run.add_servers(owner);
  run.set_reason("least loaded");
}

}  // namespace

v1::JobDefinition Definition() {
  v1::JobDefinition definition;
  v1::CreateJobRequest& manifest = *definition.mutable_manifest();
  manifest.set_job("job");
  manifest.set_shard_elements(256);
  AddTensor(&manifest, "w", v1::TENSOR_KIND_PARAMETER, v1::DTYPE_F32, {8, 100});
  AddTensor(&manifest, "bias", v1::TENSOR_KIND_PARAMETER, v1::DTYPE_BF16, {100});
  AddTensor(&manifest, "count", v1::TENSOR_KIND_BUFFER, v1::DTYPE_I64, {3});
  AddTensor(&manifest, "frozen", v1::TENSOR_KIND_PARAMETER, v1::DTYPE_F32, {2});
  manifest.mutable_tensors(1)->add_tied_names("bias.tied");
  Require(server::CompleteManifest(&manifest).ok(), "the manifest is complete");
  ToWire(server::ManifestDigest(manifest), definition.mutable_manifest_digest());
  definition.set_server_count(2);
  AddRun(&definition, 0, 0, 2, 0);
  AddRun(&definition, 0, 2, 2, 1);
  AddRun(&definition, 1, 0, 1, 1);
  AddRun(&definition, 2, 0, 1, 0);
  AddRun(&definition, 3, 0, 1, 0);
  v1::OptimizerGroup& adamw = *definition.mutable_optimizer()->add_groups();
  adamw.set_optimizer("adamw");
  adamw.set_state("8bit");
  adamw.add_tensors(0);
  v1::OptimizerGroup& lion = *definition.mutable_optimizer()->add_groups();
  lion.set_optimizer("lion");
  lion.add_tensors(1);
  lion.add_fp32_tensors(1);
  definition.set_revision(1);
  return definition;
}

const server::JobModel& Model() {
  static const auto* const model =
      new std::shared_ptr<const server::JobModel>(server::CheckDefinition(Definition()).value());
  return **model;
}

std::vector<std::string> Words() {
  return {"job",
          "w",
          "bias",
          "bias.tied",
          "count",
          "weight",
          "gradient",
          "master",
          "remainder",
          "exp_avg",
          "8bit",
          "4bit",
          "fp32",
          "adamw",
          "lion",
          "sgd",
          "muon",
          "adafactor",
          "store",
          "exact",
          "24bit",
          "bf16",
          "no_zero",
          "nearest",
          "mean",
          "sum",
          "lr",
          "beta1",
          "beta2",
          "eps",
          "a..b",
          "",
          "exp_avg_sq",
          "lamb",
          "row_var",
          "weight_decay",
          "exp_avg_absmax",
          "stochastic",
          "momentum"};
}

step::DecisionRecord Decision(int64_t step, step::DecisionKind kind) {
  step::DecisionRecord decision;
  decision.step = step;
  decision.generation = 1;
  decision.attempt = 1;
  decision.kind = kind;
  decision.applied_count = {step, step, 0, 0};
  decision.untouched = {0, 0, 1, 1};
  decision.identity = step::Identify(decision);
  return decision;
}

void Identify(v1::DecisionBody* decision) {
  ToWire(step::Identify(*server::ToStep(*decision)), decision->mutable_identity());
}

}  // namespace orlop::fuzz
