// Who contributes which boxes of which gradients, from the wire's layouts to the pieces that shards
// expect. Pure; any thread.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "base/box.h"
#include "orlop/v1/job.pb.h"
#include "server/job/job_model.h"
#include "server/job/slots.h"
#include "server/step/layout.h"

namespace orlop::server {

// A piece that a contributor's layout makes it push. `region` is the index of the box among the
// contributor's boxes of the tensor; (shard, rank, region) is the piece's key.
struct ExpectedPiece {
  int32_t shard = 0;
  uint32_t rank = 0;
  int32_t region = 0;
  Box box;
};

// A box of the wire, flat wherever its elements are one range. A null `box` is the whole tensor.
//   Status  InvalidArgument: the box is not inside the tensor.
absl::StatusOr<Box> NormalBox(const Tensor& tensor, const v1::Box* box);

// One rank's part of a contribution layout.
//   Status  InvalidArgument naming tensor and box.
absl::StatusOr<std::vector<step::Contribution>> Contributions(const JobModel& model,
                                                              const v1::ContributionLayout& layout,
                                                              uint32_t rank, uint32_t world_size);

// Every piece that the shards of `owned` expect from `contributions`, for ShardStore::SetLayout.
std::vector<ExpectedPiece> PiecesFor(const JobModel& model, const OwnedShards& owned,
                                     const step::Layout& contributions);

}  // namespace orlop::server
