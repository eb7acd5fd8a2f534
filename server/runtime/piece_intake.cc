#include "server/runtime/piece_intake.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "server/job/job_model.h"
#include "server/job/slots.h"
#include "server/step/layout.h"
#include "server/step/messages.h"
#include "server/step/participant.h"

namespace orlop::server {
namespace {

// The index of the request's box among those that its rank contributes to the tensor.
absl::StatusOr<uint64_t> RegionOf(const PieceRequest& request, const JobModel& model,
                                  const step::Layout* layout) {
  if (layout == nullptr)
    return absl::UnavailableError(
        absl::StrCat("job '", model.job(), "': no generation has formed here yet"));
  const auto rank = static_cast<size_t>(request.rank);
  if (rank >= layout->by_rank.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", rank, " of a world of ", layout->by_rank.size()));
  }
  const std::vector<step::Contribution>& own = layout->by_rank[rank];
  const auto it = std::lower_bound(own.begin(), own.end(), static_cast<int32_t>(request.tensor),
                                   [](const step::Contribution& contribution, int32_t tensor) {
                                     return contribution.tensor < tensor;
                                   });
  if (it != own.end() && it->tensor == static_cast<int32_t>(request.tensor)) {
    const auto found = std::find(it->boxes.begin(), it->boxes.end(), request.box);
    if (found != it->boxes.end()) return static_cast<uint64_t>(found - it->boxes.begin());
  }
  return absl::InvalidArgumentError(
      absl::StrCat("tensor '", model.tensors()[request.tensor].name, "': box ",
                   ToString(request.box), " is not in the contribution layout of rank ", rank));
}

}  // namespace

absl::StatusOr<step::PushPiece> PieceOf(const PieceRequest& request, const JobModel& model,
                                        const step::Layout* layout) {
  const step::AttemptKey& key = request.key;
  step::PushPiece piece;
  piece.key = {key.generation, key.step, key.attempt, request.shard, request.rank, 0};
  piece.epoch = key.epoch;
  piece.is_load = request.is_load;
  piece.scale = request.loss_scale;
  piece.applied_count = request.applied_count;
  if (request.is_load) {
    piece.key.region = step::LoadRegion(SlotName(request.slot), request.box);
    return piece;
  }
  const absl::StatusOr<uint64_t> region = RegionOf(request, model, layout);
  if (!region.ok()) return region.status();
  piece.key.region = *region;
  return piece;
}

}  // namespace orlop::server
