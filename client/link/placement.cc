#include "client/link/placement.h"

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "client/link/manifest.h"
#include "orlop/v1/types.pb.h"

namespace orlop::client {
namespace {

constexpr uint32_t kNobody = ~uint32_t{0};

absl::Status MapError(const v1::PlacementMap& map, std::string_view tensor, uint64_t shard,
                      std::string_view fault) {
  return absl::DataLossError(absl::StrCat("placement map of epoch ", map.epoch(), ": tensor ",
                                          std::string(tensor), " shard ", shard,
                                          std::string(fault)));
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Placement>> Placement::Build(v1::PlacementMap map,
                                                                  const Manifest& manifest) {
  auto placement = std::make_shared<Placement>();
  uint64_t shards = 0;
  for (uint32_t i = 0; i < manifest.size(); ++i) {
    placement->first_shard_.push_back(shards);
    shards += manifest.shard_count(i);
  }
  placement->owners_.assign(shards, kNobody);
  for (const v1::PlacementRun& run : map.runs()) {
    if (run.tensor() >= manifest.size())
      return MapError(map, absl::StrCat("#", run.tensor()), run.first_shard(),
                      " is not in the manifest");
    const std::string& name = manifest.tensor(run.tensor()).name();
    const uint64_t count = manifest.shard_count(run.tensor());
    if (run.first_shard() > count || run.shard_count() > count - run.first_shard())
      return MapError(map, name, run.first_shard(), " run ends beyond the tensor");
    if (run.servers_size() == 0 || run.servers(0) >= static_cast<uint32_t>(map.servers_size()))
      return MapError(map, name, run.first_shard(), " has no known server");
    for (uint64_t s = 0; s < run.shard_count(); ++s)
      placement->owners_[placement->first_shard_[run.tensor()] + run.first_shard() + s] =
          run.servers(0);
  }
  for (uint32_t i = 0; i < manifest.size(); ++i)
    for (uint64_t s = 0; s < manifest.shard_count(i); ++s)
      if (placement->OwnerOf(i, s) == kNobody)
        return MapError(map, manifest.tensor(i).name(), s, " has no owner");
  placement->map_ = std::move(map);
  return std::shared_ptr<const Placement>(std::move(placement));
}

}  // namespace orlop::client
