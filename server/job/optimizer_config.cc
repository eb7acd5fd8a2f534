#include "server/job/optimizer_config.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/optimizer.h"
#include "kernels/quantize.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/job/job_model.h"
#include "server/job/manifest.h"
#include "server/job/slots.h"

namespace orlop::server {
namespace {

// The words that a group may have, and the enum value of each. The first is the default.
constexpr absl::string_view kStateNames[] = {"8bit", "fp32", "4bit"};
constexpr kernels::StateFormat kStateFormats[] = {
    kernels::StateFormat::k8Bit, kernels::StateFormat::kFp32, kernels::StateFormat::k4Bit};
constexpr absl::string_view kMasterNames[] = {"exact", "24bit", "bf16"};
constexpr kernels::MasterFormat kMasterFormats[] = {
    kernels::MasterFormat::kExact, kernels::MasterFormat::k24Bit, kernels::MasterFormat::kBF16Only};
constexpr absl::string_view kRoundingNames[] = {"no_zero", "nearest", "stochastic"};
constexpr kernels::Rounding kRoundings[] = {kernels::Rounding::kNoZero, kernels::Rounding::kNearest,
                                            kernels::Rounding::kStochastic};

// Returns the index of a word in `known`; 0 if the word is empty, known.size() if it is unknown.
size_t IndexOf(absl::Span<const absl::string_view> known, absl::string_view word) {
  if (word.empty()) return 0;
  return static_cast<size_t>(std::find(known.begin(), known.end(), word) - known.begin());
}

// Checks that a word is one of `known`. Status: InvalidArgument, naming the field, its value and
// the known words.
absl::Status CheckWord(int group, absl::string_view field, absl::string_view word,
                       absl::Span<const absl::string_view> known) {
  if (IndexOf(known, word) < known.size()) return absl::OkStatus();
  const std::string words = absl::StrJoin(known, " or ");
  return BadRequest(field, word, words,
                    absl::StrCat("group ", group, ": ", field, " '", word, "' is not ", words));
}

// Checks that `optimizer` can train tensor `t` in group `g`. `group_of` has, by tensor, the group
// that an earlier call found; -1: none.
absl::Status CheckTensor(const JobModel& model, const kernels::Optimizer& optimizer, int g,
                         uint32_t t, const std::vector<int>& group_of) {
  const std::string what = absl::StrCat("group ", g, ": ");
  if (t >= model.tensors().size())
    return BadRequest(
        "tensors", absl::StrCat(t), absl::StrCat(model.tensors().size()),
        absl::StrCat(what, "tensor ", t, " is beyond the manifest's ", model.tensors().size()));
  const Tensor& tensor = model.tensors()[t];
  if (!tensor.is_parameter)
    return BadRequest("tensors", tensor.name, "a parameter",
                      absl::StrCat(what, "'", tensor.name, "' is a buffer"));
  if (group_of[t] >= 0)
    return BadRequest(
        "tensors", tensor.name, "one group",
        absl::StrCat(what, "'", tensor.name, "' is in group ", group_of[t], " already"));
  const size_t dimensions = tensor.shape.size();
  if (optimizer.scope == kernels::Scope::kMatrix && dimensions != 2)
    return BadRequest("tensors", tensor.name, "2 dimensions",
                      absl::StrCat(what, optimizer.name, " steps matrices; '", tensor.name,
                                   "' has ", dimensions, " dimensions"));
  return absl::OkStatus();
}

// Checks group `g` and enters its tensors into `group_of`.
absl::Status CheckGroup(const JobModel& model, const v1::OptimizerGroup& group, int g,
                        std::vector<int>* group_of) {
  const std::string what = absl::StrCat("group ", g, ": ");
  const kernels::Optimizer* optimizer = kernels::FindOptimizer(group.optimizer());
  if (optimizer == nullptr) {
    const std::string known = kernels::OptimizerNames();
    return BadRequest("optimizer", group.optimizer(), known,
                      absl::StrCat(what, "optimizer '", group.optimizer(), "' is none of ", known));
  }
  absl::Status words = CheckWord(g, "state", group.state(), kStateNames);
  words.Update(CheckWord(g, "master", group.master(), kMasterNames));
  words.Update(CheckWord(g, "rounding", group.rounding(), kRoundingNames));
  if (!words.ok()) return words;
  for (uint32_t t : group.tensors()) {
    if (absl::Status status = CheckTensor(model, *optimizer, g, t, *group_of); !status.ok())
      return status;
    (*group_of)[t] = g;
  }
  for (uint32_t t : group.fp32_tensors()) {
    if (t >= group_of->size() || (*group_of)[t] != g)
      return BadRequest("fp32_tensors", absl::StrCat(t), "tensors of the group",
                        absl::StrCat(what, "fp32 tensor ", t, " is not in the group"));
  }
  return absl::OkStatus();
}

}  // namespace

const char* StateName(kernels::StateFormat format) {
  for (size_t i = 0; i < std::size(kStateFormats); ++i)
    if (kStateFormats[i] == format) return kStateNames[i].data();
  return "";
}

TensorOptimizer OptimizerOf(const v1::OptimizerGroup& group) {
  TensorOptimizer optimizer;
  optimizer.optimizer = kernels::FindOptimizer(group.optimizer());
  optimizer.state = kStateFormats[IndexOf(kStateNames, group.state())];
  optimizer.master = kMasterFormats[IndexOf(kMasterNames, group.master())];
  optimizer.rounding = kRoundings[IndexOf(kRoundingNames, group.rounding())];
  return optimizer;
}

absl::Status ValidateOptimizer(const JobModel& model,
                               const v1::ConfigureOptimizerRequest& optimizer) {
  if (optimizer.groups_size() > static_cast<int>(kMaxGroups)) {
    return BadRequest("groups", absl::StrCat(optimizer.groups_size()), absl::StrCat(kMaxGroups),
                      absl::StrCat(optimizer.groups_size(), " groups; the limit is ", kMaxGroups));
  }
  if (!(optimizer.max_norm() >= 0) || optimizer.max_norm() > 1e300) {
    return BadRequest("max_norm", absl::StrCat(optimizer.max_norm()), "0 or more",
                      "max_norm must be finite and 0 or more");
  }
  const auto one_of = [](const std::string& value, std::initializer_list<const char*> known) {
    return std::any_of(known.begin(), known.end(), [&](const char* k) { return value == k; });
  };
  if (!one_of(optimizer.reduce(), {"", "mean", "sum"})) {
    return BadRequest("reduce", optimizer.reduce(), "mean or sum",
                      absl::StrCat("reduce '", optimizer.reduce(), "' is not mean or sum"));
  }
  std::vector<int> group_of(model.tensors().size(), -1);
  for (int g = 0; g < optimizer.groups_size(); ++g)
    if (absl::Status status = CheckGroup(model, optimizer.groups(g), g, &group_of); !status.ok())
      return status;
  if (const int g = GroupThatTakesWeights(optimizer); g >= 0 && optimizer.max_norm() > 0) {
    return BadRequest("max_norm", absl::StrCat(optimizer.max_norm()), "0",
                      absl::StrCat("max_norm is ", optimizer.max_norm(), ", but group ", g,
                                   " has optimizer '", optimizer.groups(g).optimizer(),
                                   "', which takes weights: these cannot be clipped"));
  }
  return CheckWholeTensors(model, optimizer);
}

int GroupThatTakesWeights(const v1::ConfigureOptimizerRequest& optimizer) {
  for (int g = 0; g < optimizer.groups_size(); ++g)
    if (kernels::FindOptimizer(optimizer.groups(g).optimizer())->takes_weights) return g;
  return -1;
}

bool NeedsWholeTensor(const kernels::Optimizer& optimizer) {
  return optimizer.scope != kernels::Scope::kElement;
}

absl::Status CheckWholeTensors(const JobModel& model,
                               const v1::ConfigureOptimizerRequest& optimizer,
                               absl::FunctionRef<bool(const kernels::Optimizer&)> needs_whole) {
  for (int g = 0; g < optimizer.groups_size(); ++g) {
    const v1::OptimizerGroup& group = optimizer.groups(g);
    if (!needs_whole(*kernels::FindOptimizer(group.optimizer()))) continue;
    for (uint32_t t : group.tensors()) {
      if (model.LiesWhole(t)) continue;
      v1::ErrorDetail detail;
      detail.set_reason(v1::ErrorDetail::CONFLICT);
      detail.set_job(model.job());
      detail.set_tensor(model.tensors()[t].name);
      detail.set_field("optimizer");
      detail.set_actual(group.optimizer());
      detail.set_limit("TensorSpec.whole");
      return MakeError(
          absl::StatusCode::kFailedPrecondition,
          absl::StrCat("group ", g, ": optimizer '", group.optimizer(),
                       "' looks at whole tensors, but the ", model.ShardCountOf(t),
                       " shards of tensor '", detail.tensor(),
                       "' lie on several servers: create the job with TensorSpec.whole set for it"),
          detail);
    }
  }
  return absl::OkStatus();
}

}  // namespace orlop::server
