#include "server/job/job_model.h"

#include <algorithm>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/checksum.h"
#include "kernels/types.h"
#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/job/step_codec.h"

namespace orlop::server {
namespace {

absl::Status BadRequest(absl::string_view field, absl::string_view actual, absl::string_view limit,
                        const std::string& message) {
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::BAD_REQUEST);
  detail.set_field(std::string(field));
  detail.set_actual(std::string(actual));
  detail.set_limit(std::string(limit));
  return MakeError(absl::StatusCode::kInvalidArgument, message, detail);
}

std::vector<uint64_t> ShapeOf(const v1::TensorSpec& tensor) {
  return {tensor.shape().begin(), tensor.shape().end()};
}

// Words of a group's configuration, the default first.
constexpr absl::string_view kStateNames[] = {"8bit", "fp32", "4bit"};
constexpr kernels::StateFormat kStateFormats[] = {
    kernels::StateFormat::k8Bit, kernels::StateFormat::kFp32, kernels::StateFormat::k4Bit};
constexpr absl::string_view kMasterNames[] = {"exact", "24bit", "bf16"};
constexpr kernels::MasterFormat kMasterFormats[] = {
    kernels::MasterFormat::kExact, kernels::MasterFormat::k24Bit, kernels::MasterFormat::kBF16Only};
constexpr absl::string_view kRoundingNames[] = {"no_zero", "nearest", "stochastic"};
constexpr kernels::Rounding kRoundings[] = {kernels::Rounding::kNoZero, kernels::Rounding::kNearest,
                                            kernels::Rounding::kStochastic};

// The place of a word among `known`; empty means the first; known.size() if it is none of them.
size_t IndexOf(absl::Span<const absl::string_view> known, absl::string_view word) {
  if (word.empty()) return 0;
  return static_cast<size_t>(std::find(known.begin(), known.end(), word) - known.begin());
}

// InvalidArgument naming the field, its value and the words it may have.
absl::Status CheckWord(int group, absl::string_view field, absl::string_view word,
                       absl::Span<const absl::string_view> known) {
  if (IndexOf(known, word) < known.size()) return absl::OkStatus();
  const std::string words = absl::StrJoin(known, " or ");
  return BadRequest(field, word, words,
                    absl::StrCat("group ", group, ": ", field, " '", word, "' is not ", words));
}

}  // namespace

const char* StateName(kernels::StateFormat format) {
  for (size_t i = 0; i < std::size(kStateFormats); ++i)
    if (kStateFormats[i] == format) return kStateNames[i].data();
  return "";
}

absl::Status ValidateName(absl::string_view what, absl::string_view name) {
  const std::string quoted = absl::StrCat(what, " '", name.substr(0, 300), "'");
  if (name.empty() || name.size() > kMaxNameBytes) {
    return BadRequest(
        what, absl::StrCat(name.size(), " bytes"), absl::StrCat(kMaxNameBytes, " bytes"),
        absl::StrCat(quoted, " has ", name.size(), " bytes; a name has 1 to ", kMaxNameBytes));
  }
  for (char c : name) {
    if (!absl::ascii_isalnum(static_cast<unsigned char>(c)) &&
        !absl::StrContains("._/-", absl::string_view(&c, 1))) {
      return BadRequest(what, name, "[A-Za-z0-9._/-]",
                        absl::StrCat(quoted, " holds a character outside [A-Za-z0-9._/-]"));
    }
  }
  if (name.find("..") != absl::string_view::npos)
    return BadRequest(what, name, "no '..'", absl::StrCat(quoted, " contains '..'"));
  return absl::OkStatus();
}

absl::Status ValidateTensorSpec(const v1::TensorSpec& tensor) {
  if (absl::Status status = ValidateName("tensor name", tensor.name()); !status.ok()) return status;
  const std::string what = absl::StrCat("tensor '", tensor.name(), "'");
  if (tensor.tied_names_size() > static_cast<int>(kMaxTiedNames)) {
    return BadRequest("tied_names", absl::StrCat(tensor.tied_names_size()),
                      absl::StrCat(kMaxTiedNames),
                      absl::StrCat(what, " has ", tensor.tied_names_size(),
                                   " tied names; the limit is ", kMaxTiedNames));
  }
  for (const std::string& tied : tensor.tied_names()) {
    if (absl::Status status = ValidateName("tied name", tied); !status.ok()) return status;
  }
  if (absl::StatusOr<uint64_t> count = ElementCount(ShapeOf(tensor)); !count.ok()) {
    return BadRequest("shape", absl::StrCat(tensor.shape_size(), " dimensions"), "",
                      absl::StrCat(what, ": ", count.status().message()));
  }
  if (ElementBytes(tensor.dtype()) == 0 ||
      (tensor.kind() == v1::TENSOR_KIND_PARAMETER && !IsFloat(tensor.dtype()))) {
    return BadRequest("dtype", absl::StrCat(tensor.dtype()), "float32, bfloat16 or float16",
                      absl::StrCat(what, " has dtype ", std::string(DTypeName(tensor.dtype())),
                                   "; a parameter is float32, bfloat16 or float16"));
  }
  if (tensor.kind() != v1::TENSOR_KIND_PARAMETER && tensor.kind() != v1::TENSOR_KIND_BUFFER) {
    return BadRequest("kind", absl::StrCat(tensor.kind()), "PARAMETER or BUFFER",
                      absl::StrCat(what, " has an unknown kind"));
  }
  return absl::OkStatus();
}

absl::Status CompleteManifest(v1::CreateJobRequest* manifest) {
  if (manifest->tensors_size() == 0)
    return BadRequest("tensors", "0", "1", "a job needs at least one tensor");
  if (manifest->shard_elements() == 0) manifest->set_shard_elements(kDefaultShardElements);
  const uint64_t elements = manifest->shard_elements();
  if (elements < kMinShardElements || elements > kMaxShardElements ||
      elements % kMinShardElements != 0) {
    return BadRequest("shard_elements", absl::StrCat(elements), absl::StrCat(kMaxShardElements),
                      absl::StrCat("shard_elements ", elements, " must be a multiple of ",
                                   kMinShardElements, " up to ", kMaxShardElements));
  }
  if (manifest->durability() == v1::DURABILITY_UNSPECIFIED)
    manifest->set_durability(v1::DURABILITY_MEMORY);
  if (manifest->durability() != v1::DURABILITY_MEMORY) {
    const std::string name = v1::Durability_Name(manifest->durability());
    v1::ErrorDetail detail;
    detail.set_reason(v1::ErrorDetail::BAD_REQUEST);
    detail.set_field("durability");
    detail.set_actual(name.empty() ? absl::StrCat(manifest->durability()) : name);
    detail.set_limit("DURABILITY_MEMORY");
    return MakeError(absl::StatusCode::kUnimplemented,
                     absl::StrCat("durability ", detail.actual(),
                                  " is not offered by this build; it offers DURABILITY_MEMORY"),
                     detail);
  }
  manifest->set_more(false);
  manifest->set_first(0);
  return absl::OkStatus();
}

Digest128 ManifestDigest(const v1::CreateJobRequest& manifest) {
  const std::string bytes =
      manifest
          .SerializeAsString();  // no maps and no unknown fields of ours: one form on every server
  return Digest(bytes.data(), bytes.size());
}

absl::StatusOr<std::shared_ptr<const JobModel>> JobModel::Make(v1::JobDefinition definition) {
  std::shared_ptr<JobModel> model(new JobModel());
  model->definition_ = std::move(definition);
  if (absl::Status status = model->Build(); !status.ok()) return status;
  return std::shared_ptr<const JobModel>(std::move(model));
}

absl::Status JobModel::Build() {
  const v1::CreateJobRequest& manifest = definition_.manifest();
  auto spec = std::make_shared<step::JobSpec>();
  spec->manifest_digest = ToStep(definition_.manifest_digest());
  spec->level = step::Level::kMemory;
  spec->arithmetic_version = kernels::kArithmeticVersion;
  spec->server_count = static_cast<int>(definition_.server_count());
  for (uint32_t t = 0; t < static_cast<uint32_t>(manifest.tensors_size()); ++t) {
    const v1::TensorSpec& wire = manifest.tensors(t);
    if (absl::Status status = ValidateTensorSpec(wire); !status.ok()) return status;
    Tensor tensor{wire.name(), wire.kind() == v1::TENSOR_KIND_PARAMETER, ShapeOf(wire),
                  wire.dtype(), *ElementCount(ShapeOf(wire))};
    std::vector<std::string> names(wire.tied_names().begin(), wire.tied_names().end());
    names.push_back(wire.name());
    for (const std::string& name : names) {
      if (!by_name_.emplace(name, t).second) {
        return BadRequest("name", name, "",
                          absl::StrCat("tensor name '", name, "' is given twice"));
      }
    }
    if (tensor.is_parameter) parameter_count_ += tensor.element_count;
    step::TensorSpec step_tensor{
        tensor.name, {tensor.shape.begin(), tensor.shape.end()}, tensor.is_parameter};
    spec->tensors.push_back(std::move(step_tensor));
    first_shard_.push_back(static_cast<int32_t>(spec->shards.size()));
    const uint64_t shards = ShardCount(tensor.element_count, shard_elements());
    if (shards > kMaxShards - spec->shards.size()) {
      return BadRequest(
          "shard_elements", absl::StrCat(shard_elements()), "",
          absl::StrCat("the job has more than ", kMaxShards, " shards of ", shard_elements(),
                       " elements, counted to tensor '", wire.name(), "': make them larger"));
    }
    for (uint64_t s = 0; s < shards; ++s) {
      const Range range = ShardRange(s, tensor.element_count, shard_elements());
      spec->shards.push_back({static_cast<step::TensorId>(t),
                              static_cast<int64_t>(range.begin),
                              static_cast<int64_t>(range.count()),
                              {}});
    }
    tensors_.push_back(std::move(tensor));
  }
  first_shard_.push_back(static_cast<int32_t>(spec->shards.size()));
  run_of_shard_.assign(spec->shards.size(), -1);
  for (int r = 0; r < definition_.runs_size(); ++r) {
    const v1::PlacementRun& run = definition_.runs(r);
    if (run.tensor() >= tensors_.size() || run.servers_size() != 1 ||
        run.first_shard() + run.shard_count() > ShardCountOf(run.tensor())) {
      return absl::InvalidArgumentError(
          absl::StrCat("placement run ", r, " does not fit the manifest"));
    }
    for (uint64_t s = 0; s < run.shard_count(); ++s) {
      const int32_t shard =
          first_shard_[run.tensor()] + static_cast<int32_t>(run.first_shard() + s);
      spec->shards[shard].copies = {static_cast<int32_t>(run.servers(0))};
      run_of_shard_[shard] = r;
    }
  }
  if (definition_.runs_size() > 0) {
    if (absl::Status status = step::ValidateJobSpec(*spec); !status.ok()) return status;
  }
  group_.assign(tensors_.size(), -1);
  for (int g = 0; g < definition_.optimizer().groups_size(); ++g) {
    for (uint32_t t : definition_.optimizer().groups(g).tensors()) {
      if (t < group_.size()) group_[t] = g;
    }
  }
  spec_ = std::move(spec);
  return absl::OkStatus();
}

absl::StatusOr<uint32_t> JobModel::FindTensor(absl::string_view name) const {
  const auto it = by_name_.find(name);
  if (it != by_name_.end()) return it->second;
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::UNKNOWN_TENSOR);
  detail.set_job(job());
  detail.set_tensor(std::string(name.substr(0, kMaxNameBytes)));
  return MakeError(absl::StatusCode::kNotFound,
                   absl::StrCat("job '", job(), "' has no tensor '", detail.tensor(), "'"), detail);
}

bool JobModel::LiesWhole(uint32_t tensor) const {
  for (int32_t shard = first_shard_[tensor] + 1; shard < first_shard_[tensor + 1]; ++shard)
    if (Owner(shard) != Owner(shard - 1)) return false;
  return true;
}

const std::string& JobModel::ReasonOf(int32_t shard) const {
  return definition_.runs(run_of_shard_[shard]).reason();
}

JobLayout JobModel::LayoutFor(int server) const {
  JobLayout layout{job(), tensors_, {}};
  for (uint32_t t = 0; t < tensors_.size(); ++t) {
    for (int32_t id = first_shard_[t]; id < first_shard_[t + 1]; ++id) {
      if (Owner(id) != server) continue;
      const uint64_t index = static_cast<uint64_t>(id - first_shard_[t]);
      layout.shards.push_back(
          {id, t, index, ShardRange(index, tensors_[t].element_count, shard_elements())});
    }
  }
  return layout;
}

std::vector<TensorOptimizer> JobModel::Optimizers() const {
  std::vector<TensorOptimizer> optimizers(tensors_.size());
  for (const v1::OptimizerGroup& group : definition_.optimizer().groups()) {
    const std::set<uint32_t> fp32(group.fp32_tensors().begin(), group.fp32_tensors().end());
    TensorOptimizer wanted;
    wanted.optimizer = kernels::FindOptimizer(group.optimizer());
    wanted.state = kStateFormats[IndexOf(kStateNames, group.state())];
    wanted.master = kMasterFormats[IndexOf(kMasterNames, group.master())];
    wanted.rounding = kRoundings[IndexOf(kRoundingNames, group.rounding())];
    for (uint32_t t : group.tensors()) {
      optimizers[t] = wanted;
      optimizers[t].state = StateFormatOf(tensors_[t], wanted.state, fp32.count(t) > 0);
    }
  }
  return optimizers;
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
  for (int g = 0; g < optimizer.groups_size(); ++g) {
    const v1::OptimizerGroup& group = optimizer.groups(g);
    const std::string what = absl::StrCat("group ", g, ": ");
    if (kernels::FindOptimizer(group.optimizer()) == nullptr) {
      const std::string known = kernels::OptimizerNames();
      return BadRequest(
          "optimizer", group.optimizer(), known,
          absl::StrCat(what, "optimizer '", group.optimizer(), "' is none of ", known));
    }
    absl::Status words = CheckWord(g, "state", group.state(), kStateNames);
    words.Update(CheckWord(g, "master", group.master(), kMasterNames));
    words.Update(CheckWord(g, "rounding", group.rounding(), kRoundingNames));
    if (!words.ok()) return words;
    for (uint32_t t : group.tensors()) {
      if (t >= model.tensors().size())
        return BadRequest(
            "tensors", absl::StrCat(t), absl::StrCat(model.tensors().size()),
            absl::StrCat(what, "tensor ", t, " is beyond the manifest's ", model.tensors().size()));
      if (!model.tensors()[t].is_parameter)
        return BadRequest("tensors", model.tensors()[t].name, "a parameter",
                          absl::StrCat(what, "'", model.tensors()[t].name, "' is a buffer"));
      if (group_of[t] >= 0)
        return BadRequest("tensors", model.tensors()[t].name, "one group",
                          absl::StrCat(what, "'", model.tensors()[t].name, "' is in group ",
                                       group_of[t], " already"));
      const bool matrices =
          kernels::FindOptimizer(group.optimizer())->scope == kernels::Scope::kMatrix;
      if (const size_t dimensions = model.tensors()[t].shape.size(); matrices && dimensions != 2)
        return BadRequest(
            "tensors", model.tensors()[t].name, "2 dimensions",
            absl::StrCat(what, group.optimizer(), " steps matrices; '", model.tensors()[t].name,
                         "' has ", dimensions, " dimensions"));
      group_of[t] = g;
    }
    for (uint32_t t : group.fp32_tensors()) {
      if (t >= group_of.size() || group_of[t] != g)
        return BadRequest("fp32_tensors", absl::StrCat(t), "tensors of the group",
                          absl::StrCat(what, "fp32 tensor ", t, " is not in the group"));
    }
  }
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

absl::StatusOr<Box> NormalBox(const Tensor& tensor, const v1::Box* wire) {
  if (wire == nullptr) return WholeTensor(tensor.element_count);
  if (wire->offset_size() > static_cast<int>(kMaxDimensions) ||
      wire->extent_size() > static_cast<int>(kMaxDimensions)) {
    return BadRequest(
        "box", absl::StrCat(wire->offset_size(), " dimensions"), absl::StrCat(kMaxDimensions),
        absl::StrCat("tensor '", tensor.name, "': a box has at most ", kMaxDimensions,
                     " dimensions, this one ", std::max(wire->offset_size(), wire->extent_size())));
  }
  Box box{{wire->offset().begin(), wire->offset().end()},
          {wire->extent().begin(), wire->extent().end()},
          wire->flat()};
  if (absl::Status status = ValidateBox(box, tensor.shape, tensor.element_count); !status.ok()) {
    v1::ErrorDetail detail;
    detail.set_reason(v1::ErrorDetail::BAD_REQUEST);
    detail.set_tensor(tensor.name);
    detail.set_field("box");
    detail.set_actual(ToString(box));
    return MakeError(status.code(), absl::StrCat("tensor '", tensor.name, "': ", status.message()),
                     detail);
  }
  return Simplified(box, tensor.shape);
}

Box FromStepBox(const step::Box& box) {
  return {{box.offset.begin(), box.offset.end()},
          {box.extent.begin(), box.extent.end()},
          box.offset.size() == 1};
}

absl::StatusOr<std::vector<step::Contribution>> Contributions(const JobModel& model,
                                                              const v1::ContributionLayout& layout,
                                                              uint32_t rank, uint32_t world_size) {
  const step::Mode mode = layout.mode() == v1::ContributionLayout::EXACTLY_ONCE
                              ? step::Mode::kExactlyOnce
                              : step::Mode::kSum;
  std::map<uint32_t, step::Contribution> by_tensor;
  const auto add = [&](uint32_t t, const Box& box) {
    step::Contribution& contribution = by_tensor[t];
    contribution.tensor = static_cast<step::TensorId>(t);
    contribution.mode = mode;
    contribution.boxes.push_back(ToStepBox(box));
  };
  if (layout.preset() == v1::ContributionLayout::EXPLICIT) {
    for (const v1::TensorBoxes& boxes : layout.tensors()) {
      if (boxes.tensor() >= model.tensors().size())
        return BadRequest(
            "layout.tensors", absl::StrCat(boxes.tensor()), absl::StrCat(model.tensors().size()),
            absl::StrCat("layout names tensor ", boxes.tensor(), " of ", model.tensors().size()));
      const Tensor& tensor = model.tensors()[boxes.tensor()];
      if (!model.Trains(boxes.tensor()))
        return BadRequest("layout.tensors", tensor.name, "a trainable parameter",
                          absl::StrCat("layout names '", tensor.name, "', which does not train"));
      if (boxes.boxes_size() > static_cast<int>(kMaxBoxesPerTensor))
        return BadRequest("layout.boxes", absl::StrCat(boxes.boxes_size()),
                          absl::StrCat(kMaxBoxesPerTensor),
                          absl::StrCat("tensor '", tensor.name, "' has ", boxes.boxes_size(),
                                       " boxes; the limit is ", kMaxBoxesPerTensor));
      for (const v1::Box& wire : boxes.boxes()) {
        absl::StatusOr<Box> box = NormalBox(tensor, &wire);
        if (!box.ok()) return box.status();
        add(boxes.tensor(), *box);
      }
    }
  } else {
    for (uint32_t t = 0; t < model.tensors().size(); ++t) {
      if (!model.Trains(t)) continue;
      const uint64_t n = model.tensors()[t].element_count;
      if (layout.preset() == v1::ContributionLayout::WHOLE) {
        add(t, WholeTensor(n));
        continue;
      }
      const uint64_t part = ((n + world_size - 1) / world_size + 255) / 256 * 256;
      const uint64_t begin = std::min(rank * part, n), end = std::min(begin + part, n);
      if (begin < end) add(t, Box{{begin}, {end - begin}, true});
    }
  }
  for (uint32_t t = 0; t < model.tensors().size();
       ++t) {  // frozen parameters are mentioned as such
    if (!model.tensors()[t].is_parameter || model.Trains(t)) continue;
    by_tensor[t].tensor = static_cast<step::TensorId>(t);
    by_tensor[t].mode = step::Mode::kNone;
  }
  std::vector<step::Contribution> contributions;
  for (auto& [tensor, contribution] : by_tensor) contributions.push_back(std::move(contribution));
  return contributions;
}

std::vector<ExpectedPiece> PiecesFor(const JobModel& model, const JobLayout& owned,
                                     const step::Layout& layout) {
  // Shards of a tensor lie together, so each contribution meets a run of them.
  std::map<uint32_t, std::vector<const OwnedShard*>> shards_of;
  for (const OwnedShard& shard : owned.shards) shards_of[shard.tensor].push_back(&shard);
  std::vector<ExpectedPiece> pieces;
  for (uint32_t rank = 0; rank < layout.by_rank.size(); ++rank) {
    for (const step::Contribution& contribution : layout.by_rank[rank]) {
      const Tensor& tensor = model.tensors()[contribution.tensor];
      for (size_t region = 0; region < contribution.boxes.size(); ++region) {
        const Box box = FromStepBox(contribution.boxes[region]);
        for (const OwnedShard* shard : shards_of[contribution.tensor]) {
          if (!BoxPart(box, tensor.shape, shard->range).empty())
            pieces.push_back({shard->id, rank, static_cast<int32_t>(region), box});
        }
      }
    }
  }
  return pieces;
}

}  // namespace orlop::server
