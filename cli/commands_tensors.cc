// tensors, describe: commands about the tensors of a job.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cli/commands.h"
#include "cli/context.h"
#include "cli/print/json.h"
#include "cli/print/print.h"
#include "cli/print/table.h"
#include "orlop/v1/admin.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/dtype.h"

namespace orlop::cli {
namespace {

constexpr int kBarWidth = 20;

std::string Shape(const v1::TensorSpec& spec) {
  return absl::StrCat("[", absl::StrJoin(spec.shape(), ", "), "]");
}

std::string Optimizer(const v1::TensorSummary& tensor) {
  if (tensor.spec().kind() == v1::TENSOR_KIND_BUFFER) return "buffer";
  return tensor.optimizer().empty() ? "frozen"
                                    : absl::StrCat(tensor.optimizer(), " ", tensor.state());
}

// Shards that differ only in their index.
struct EqualShards {
  v1::ShardDescription first;
  std::vector<uint64_t> shards;  // ascending

  uint64_t SlotBytes() const {
    uint64_t bytes = 0;
    for (const v1::SlotBytes& slot : first.slots()) bytes += slot.bytes();
    return bytes * shards.size();
  }
};

std::vector<EqualShards> GroupEqual(const v1::DescribeTensorResponse& description) {
  std::vector<EqualShards> groups;
  std::map<std::string, size_t> group_of;
  for (const v1::ShardDescription& shard : description.shards()) {
    v1::ShardDescription key = shard;
    key.clear_shard();
    key.clear_first_element();
    const auto [it, is_new] = group_of.emplace(key.SerializeAsString(), groups.size());
    if (is_new) groups.push_back({shard, {}});
    groups[it->second].shards.push_back(shard.shard());
  }
  return groups;
}

// Returns "0-3, 6"; many runs are shortened to "0, 2, 4, ..., 98".
std::string Runs(const std::vector<uint64_t>& shards) {
  std::vector<std::string> runs;
  for (size_t i = 0, end; i < shards.size(); i = end) {
    for (end = i + 1; end < shards.size() && shards[end] == shards[end - 1] + 1;) ++end;
    runs.push_back(end - i == 1 ? absl::StrCat(shards[i])
                                : absl::StrCat(shards[i], "-", shards[end - 1]));
  }
  if (runs.size() > 6) runs = {runs[0], runs[1], runs[2], "...", runs.back()};
  return absl::StrJoin(runs, ", ");
}

std::string Elements(const EqualShards& group) {
  const v1::ShardDescription& first = group.first;
  if (group.shards.size() > 1)
    return absl::StrCat(group.shards.size(), " x ", first.element_count());
  return absl::StrCat("[", first.first_element(), ", ",
                      first.first_element() + first.element_count(), ")");
}

std::string TiersOf(const v1::ShardDescription& shard) {
  std::set<std::string> tiers;
  for (const v1::SlotBytes& slot : shard.slots()) tiers.insert(slot.tier());
  return absl::StrJoin(tiers, ", ");
}

std::string ShardTable(const std::vector<EqualShards>& groups) {
  Table table({{"SHARDS"},
               {"ELEMENTS"},
               {"COPIES"},
               {"VERSION", Align::kRight},
               {"STAGE"},
               {"TIER"},
               {"BYTES", Align::kRight}});
  for (const EqualShards& group : groups) {
    const v1::ShardDescription& first = group.first;
    std::vector<std::string> row = {Runs(group.shards), Elements(group),
                                    absl::StrJoin(first.copies(), ", ")};
    if (first.error().empty())
      row.insert(row.end(), {absl::StrCat(first.version()), first.stage(), TiersOf(first),
                             HumanBytes(group.SlotBytes())});
    else
      row.insert(row.end(), {"", "not known"});
    table.AddRow(std::move(row));
  }
  return table.Render();
}

// Formats the bytes of the whole tensor by slot.
std::string SlotTable(const Context& context, const std::vector<EqualShards>& groups) {
  struct Sum {
    v1::SlotBytes slot;
    uint64_t bytes = 0;
  };
  std::vector<Sum> sums;
  uint64_t total = 0;
  for (const EqualShards& group : groups) {
    total += group.SlotBytes();
    for (const v1::SlotBytes& slot : group.first.slots()) {
      auto sum = std::find_if(sums.begin(), sums.end(), [&](const Sum& each) {
        return each.slot.slot() == slot.slot() && each.slot.tier() == slot.tier();
      });
      if (sum == sums.end()) sum = sums.insert(sum, Sum{slot});
      sum->bytes += slot.bytes() * group.shards.size();
    }
  }
  Table table({{"SLOT"}, {"DTYPE"}, {"TIER"}, {"BYTES", Align::kRight}, {"SHARE"}});
  for (const Sum& sum : sums)
    table.AddRow({sum.slot.slot(), std::string(DTypeName(sum.slot.dtype())), sum.slot.tier(),
                  HumanBytes(sum.bytes), Bar(sum.bytes, total, kBarWidth, context.terminal)});
  return table.empty() ? "" : "\n" + table.Render();
}

// Returns the reasons for the shards' placement and the errors of owners, each text once.
std::string Reasons(const std::vector<EqualShards>& groups) {
  std::vector<std::string> lines;
  for (const EqualShards& group : groups)
    for (const std::string& line :
         {absl::StrCat("why there: ", group.first.reason()),
          group.first.error().empty() ? "" : absl::StrCat("not known: ", group.first.error())})
      if (!line.empty() && std::find(lines.begin(), lines.end(), line) == lines.end())
        lines.push_back(line);
  return absl::StrCat("\n", absl::StrJoin(lines, "\n"), "\n");
}

}  // namespace

int Tensors(const Context& context, const std::string& job, const std::string& name_contains) {
  const auto client = context.Connect();
  if (!client.ok()) return Fail(context, client.status());
  const auto name = OnlyJob(client->get(), job);
  if (!name.ok()) return Fail(context, name.status());
  const auto tensors = (*client)->ListTensors(*name, name_contains);
  if (!tensors.ok()) return Fail(context, tensors.status());
  if (context.json) return PrintJson(ToJsonList(*tensors)), kOk;
  Table table({{"TENSOR"},
               {"SHAPE"},
               {"DTYPE"},
               {"OPTIMIZER"},
               {"GROUP", Align::kRight},
               {"SHARDS", Align::kRight},
               {"ELEMENTS", Align::kRight},
               {"BYTES", Align::kRight}});
  uint64_t elements = 0, bytes = 0;
  const bool has_groups = std::any_of(tensors->begin(), tensors->end(),
                                      [](const auto& tensor) { return tensor.group() > 0; });
  for (const v1::TensorSummary& tensor : *tensors) {
    table.AddRow({tensor.spec().name(), Shape(tensor.spec()),
                  std::string(DTypeName(tensor.spec().dtype())), Optimizer(tensor),
                  has_groups && !tensor.optimizer().empty() ? absl::StrCat(tensor.group()) : "",
                  absl::StrCat(tensor.shard_count()), HumanCount(tensor.element_count()),
                  HumanBytes(tensor.rest_bytes())});
    elements += tensor.element_count();
    bytes += tensor.rest_bytes();
  }
  table.AddRow({absl::StrCat("total of ", tensors->size()), "", "", "", "", "",
                HumanCount(elements), HumanBytes(bytes)});
  Print(table.Render());
  return kOk;
}

int Describe(const Context& context, const std::string& job, const std::string& tensor) {
  const auto client = context.Connect();
  if (!client.ok()) return Fail(context, client.status());
  const auto name = OnlyJob(client->get(), job);
  if (!name.ok()) return Fail(context, name.status());
  const auto description = (*client)->DescribeTensor(*name, tensor);
  if (!description.ok()) return Fail(context, description.status());
  if (context.json) return PrintJson(ToJson(*description)), kOk;
  const v1::TensorSummary& summary = description->summary();
  const v1::TensorSpec& spec = summary.spec();
  Print(absl::StrCat(
      spec.name(), "  ", Shape(spec), " ", std::string(DTypeName(spec.dtype())), "  ",
      Optimizer(summary), "\n", HumanCount(summary.element_count()), " elements in ",
      Plural(summary.shard_count(), "shard"), ", ", HumanBytes(summary.rest_bytes()), " at rest",
      spec.whole() ? ", placed whole" : "",
      summary.optimizer().empty() ? "" : ", " + Plural(summary.applied_count(), "update"), "\n"));
  if (spec.tied_names_size() > 0)
    Print(absl::StrCat("tied to ", absl::StrJoin(spec.tied_names(), ", "), "\n"));
  const std::vector<EqualShards> groups = GroupEqual(*description);
  Print("\n" + ShardTable(groups) + SlotTable(context, groups) + Reasons(groups));
  return kOk;
}

}  // namespace orlop::cli
