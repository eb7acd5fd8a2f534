#include "server/job/contributions.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/convert.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/job/job_model.h"
#include "server/job/manifest.h"
#include "server/job/slots.h"
#include "server/step/layout.h"

namespace orlop::server {

absl::StatusOr<Box> NormalBox(const Tensor& tensor, const v1::Box* wire) {
  if (wire == nullptr) return WholeTensor(tensor.element_count);
  if (wire->offset_size() > static_cast<int>(kMaxDimensions) ||
      wire->extent_size() > static_cast<int>(kMaxDimensions)) {
    return BadRequest(
        "box", absl::StrCat(wire->offset_size(), " dimensions"), absl::StrCat(kMaxDimensions),
        absl::StrCat("tensor '", tensor.name, "': a box has at most ", kMaxDimensions,
                     " dimensions, this one ", std::max(wire->offset_size(), wire->extent_size())));
  }
  const Box box = FromWire(*wire);
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
    contribution.boxes.push_back(box);
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
  // A layout must mention every parameter, so the frozen ones are added with mode kNone.
  for (uint32_t t = 0; t < model.tensors().size(); ++t) {
    if (!model.tensors()[t].is_parameter || model.Trains(t)) continue;
    by_tensor[t].tensor = static_cast<step::TensorId>(t);
    by_tensor[t].mode = step::Mode::kNone;
  }
  std::vector<step::Contribution> contributions;
  contributions.reserve(by_tensor.size());
  for (auto& [tensor, contribution] : by_tensor) contributions.push_back(std::move(contribution));
  return contributions;
}

std::vector<ExpectedPiece> PiecesFor(const JobModel& model, const OwnedShards& owned,
                                     const step::Layout& layout) {
  // The shards of `owned` by tensor: a contribution is compared only with the shards of its tensor.
  std::map<uint32_t, std::vector<const OwnedShard*>> shards_of;
  for (const OwnedShard& shard : owned.shards) shards_of[shard.tensor].push_back(&shard);
  std::vector<ExpectedPiece> pieces;
  for (uint32_t rank = 0; rank < layout.by_rank.size(); ++rank) {
    for (const step::Contribution& contribution : layout.by_rank[rank]) {
      const Tensor& tensor = model.tensors()[contribution.tensor];
      for (size_t region = 0; region < contribution.boxes.size(); ++region) {
        const Box& box = contribution.boxes[region];
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
