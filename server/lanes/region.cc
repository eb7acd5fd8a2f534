#include "server/lanes/region.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/job/contributions.h"
#include "server/job/job_model.h"
#include "server/job/slots.h"
#include "server/runtime/answers.h"
#include "server/runtime/wait.h"
#include "server/step/actions.h"
#include "server/step/participant.h"

namespace orlop::server {
namespace {

constexpr std::chrono::seconds kAttemptWait(3);

std::string Short(const std::string& name) { return Beginning(name, kMaxNameBytes); }

absl::Status CheckGradientSlot(const v1::Region& wire) {
  if (wire.slot().empty() || wire.slot() == "gradient") return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("tensor '", Short(wire.tensor()),
                                                 "': Push sends slot 'gradient', not '",
                                                 Short(wire.slot()), "'"));
}

}  // namespace

absl::StatusOr<Region> ParseRegion(const JobModel& model, const v1::Region& wire, RegionOf of) {
  absl::StatusOr<uint32_t> tensor = model.FindTensor(wire.tensor());
  if (!tensor.ok()) return tensor.status();
  Region region;
  region.tensor = *tensor;
  region.dtype = wire.dtype();
  const uint64_t shard_count = model.ShardCountOf(*tensor);
  region.last_shard = shard_count - 1;
  if (wire.has_shard()) region.first_shard = region.last_shard = wire.shard();
  if (region.last_shard >= shard_count)
    return absl::InvalidArgumentError(absl::StrCat("tensor '", Short(wire.tensor()),
                                                   "' has no shard ", wire.shard(), "; it has ",
                                                   shard_count));
  absl::StatusOr<Box> box =
      NormalBox(model.tensors()[*tensor], wire.has_box() ? &wire.box() : nullptr);
  if (!box.ok()) return box.status();
  region.box = *std::move(box);
  if (of == RegionOf::kGradient) {
    if (absl::Status status = CheckGradientSlot(wire); !status.ok()) return status;
    return region;
  }
  absl::StatusOr<Slot> slot = ParseSlot(wire.slot());
  if (!slot.ok()) return slot.status();
  region.slot = *slot;
  return region;
}

absl::Status CheckOnePiece(const JobModel& model, const Region& region, int self,
                           const std::vector<std::string>& server_names) {
  const std::string& name = model.tensors()[region.tensor].name;
  if (region.first_shard != region.last_shard)
    return absl::InvalidArgumentError(absl::StrCat("tensor '", name, "' has ",
                                                   model.ShardCountOf(region.tensor),
                                                   " shards: `shard` must say which"));
  const int owner = model.Owner(region.shard_id(model));
  if (owner == self) return absl::OkStatus();
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::NOT_OWNER);
  detail.set_server(server_names[owner]);
  return MakeError(absl::StatusCode::kNotFound,
                   absl::StrCat("shard ", region.first_shard, " of '", name, "' belongs to server ",
                                detail.server()),
                   detail);
}

step::AttemptKey KeyOf(const v1::StreamKey& key) {
  return {static_cast<int64_t>(key.epoch()), static_cast<int64_t>(key.generation()), key.step(),
          static_cast<int64_t>(key.attempt())};
}

Wait ForAnAttempt(const Wait& wait) {
  return {std::min(wait.deadline, std::chrono::steady_clock::now() + kAttemptWait), wait.cancelled};
}

absl::Status Explain(const absl::Status& status, const StreamPlace& place,
                     const step::Position& position) {
  if (status.ok()) return status;
  const absl::Status placed = WithPosition(status, position, place.job);
  v1::ErrorDetail detail = DetailOf(placed);
  if (detail.tensor().empty()) detail.set_tensor(place.tensor);
  if (place.shard.has_value()) detail.set_shard(*place.shard);
  return MakeError(placed.code(), std::string(placed.message()), detail);
}

}  // namespace orlop::server
