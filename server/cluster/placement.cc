#include "server/cluster/placement.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <queue>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/box.h"
#include "kernels/optimizer.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/job/job_model.h"
#include "server/job/slots.h"

namespace orlop::server {
namespace {

// A Unit is placed as one: a shard, or all shards of a whole tensor.
struct Unit {
  uint32_t tensor;
  uint64_t first_shard;
  uint64_t shard_count;
  double bytes;
};

std::vector<Unit> UnitsOf(const std::vector<TensorLoad>& tensors, uint64_t shard_elements) {
  std::vector<Unit> units;
  for (uint32_t t = 0; t < tensors.size(); ++t) {
    const auto bytes = [&](uint64_t elements) {
      return static_cast<double>(elements) * tensors[t].bytes_per_element;
    };
    const uint64_t elements = tensors[t].element_count;
    const uint64_t count = ShardCount(elements, shard_elements);
    if (tensors[t].whole) {
      units.push_back({t, 0, count, bytes(elements)});
      continue;
    }
    for (uint64_t s = 0; s < count; ++s)
      units.push_back({t, s, 1, bytes(ShardRange(s, elements, shard_elements).count())});
  }
  return units;
}

std::string Reason(bool whole, const std::string& server, double share, size_t server_count) {
  const char* what = whole ? "whole tensor, " : "";
  if (server_count == 1) return absl::StrCat(what, "the only server");
  return absl::StrFormat(
      "%s%s had the least bytes when placed, largest first; it holds %.1f%% of the job", what,
      server, share * 100);
}

// Returns the bytes of one element that placement balances: its slots, for a parameter those of
// 8-bit AdamW, and the staged gradient of a parameter as fp32. A tensor that may stay unset counts
// a thousandth of that: it is spread, and the others are balanced as if it were not there.
double BytesPerElement(const Tensor& tensor) {
  if (tensor.may_be_unset) {
    Tensor set = tensor;
    set.may_be_unset = false;
    return BytesPerElement(set) / 1000;
  }
  if (!tensor.is_parameter)
    return static_cast<double>(FormatOf(tensor, {}, Slot::kWeight, {0, 256}).Bytes(256)) / 256;
  TensorOptimizer optimizer;
  optimizer.optimizer = kernels::FindOptimizer("adamw");
  optimizer.state = StateFormatOf(tensor, kernels::StateFormat::k8Bit, false);
  double bytes = 4;  // the staged gradient
  for (size_t slot = 0; slot < kStoredSlotCount; ++slot) {
    const SlotFormat format =
        FormatOf(tensor, optimizer, static_cast<Slot>(slot), {0, tensor.element_count});
    if (format.exists())
      bytes += static_cast<double>(format.Bytes(kDefaultShardElements)) / kDefaultShardElements;
  }
  return bytes;
}

}  // namespace

std::vector<PlacedRun> PlaceShards(const std::vector<TensorLoad>& tensors, uint64_t shard_elements,
                                   const std::vector<std::string>& servers) {
  const std::vector<Unit> units = UnitsOf(tensors, shard_elements);
  std::vector<size_t> order(units.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return units[a].bytes > units[b].bytes; });

  using Load = std::pair<double, uint32_t>;  // bytes so far, server
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> least;
  for (uint32_t i = 0; i < servers.size(); ++i) least.push({0.0, i});
  std::vector<uint32_t> owner(units.size());
  std::vector<double> held(servers.size(), 0.0);
  double total = 0;
  for (size_t i : order) {
    auto [bytes, server] = least.top();
    least.pop();
    owner[i] = server;
    held[server] = bytes + units[i].bytes;
    total += units[i].bytes;
    least.push({held[server], server});
  }

  std::vector<PlacedRun> runs;
  for (size_t i = 0; i < units.size(); ++i) {
    if (!runs.empty() && runs.back().tensor == units[i].tensor && runs.back().server == owner[i]) {
      runs.back().shard_count += units[i].shard_count;
      continue;
    }
    const double share = total > 0 ? held[owner[i]] / total : 0;
    runs.push_back(
        {units[i].tensor, units[i].first_shard, units[i].shard_count, owner[i],
         Reason(tensors[units[i].tensor].whole, servers[owner[i]], share, servers.size())});
  }
  return runs;
}

absl::Status Place(const JobModel& model, const std::vector<std::string>& server_names,
                   v1::JobDefinition* definition) {
  std::vector<TensorLoad> loads;
  for (size_t t = 0; t < model.tensors().size(); ++t) {
    const Tensor& tensor = model.tensors()[t];
    loads.push_back({tensor.element_count, BytesPerElement(tensor),
                     model.definition().manifest().tensors(static_cast<int>(t)).whole()});
  }
  for (const PlacedRun& run : PlaceShards(loads, model.shard_elements(), server_names)) {
    v1::PlacementRun* out = definition->add_runs();
    out->set_tensor(run.tensor);
    out->set_first_shard(run.first_shard);
    out->set_shard_count(run.shard_count);
    out->add_servers(run.server);
    out->set_reason(run.reason);
  }
  if (definition->ByteSizeLong() <= kMaxPeerMessageBytes) return absl::OkStatus();
  return MakeError(absl::StatusCode::kInvalidArgument,
                   "the manifest with its placement is over 64 MiB: use larger shards",
                   v1::ErrorDetail::BAD_REQUEST);
}

}  // namespace orlop::server
