// Contribution layouts (which contributor pushes which boxes of which tensor): from the form of the
// wire to that of the step machine, and from there to the pieces that each shard expects.
//   Threads  The functions are pure and safe from any thread.
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

// A piece that a contributor must push under its layout: the part of `box` inside the shard.
// (shard, rank, region) is the key of the piece.
struct ExpectedPiece {
  int32_t shard = 0;  // id
  uint32_t rank = 0;
  int32_t region = 0;  // index of `box` among the contributor's boxes of the tensor
  Box box;             // the whole box; other shards may have parts of it too
};

// Converts a box of the wire. The result is flat if its elements are one range of the flattened
// tensor. A null `box` stands for the whole tensor.
//   Status  InvalidArgument (BAD_REQUEST): the box has too many dimensions, or is not inside the
//           tensor.
absl::StatusOr<Box> NormalBox(const Tensor& tensor, const v1::Box* box);

// Converts one rank's layout, with its preset expanded to boxes. The result is ascending by tensor.
// It has each tensor that the rank contributes to and, in mode kNone, each frozen parameter.
// step::ValidateLayout finds gaps and overlaps later. `rank` must be less than `world_size`; both
// matter to FLAT_SLICES only.
//   Status  InvalidArgument (BAD_REQUEST): a tensor is unknown or does not train, a box is invalid,
//           or a tensor has more than kMaxBoxesPerTensor. The message names the tensor.
absl::StatusOr<std::vector<step::Contribution>> Contributions(const JobModel& model,
                                                              const v1::ContributionLayout& layout,
                                                              uint32_t rank, uint32_t world_size);

// Returns every piece that the shards of `owned` expect under a validated layout, for
// ShardStore::SetLayout.
std::vector<ExpectedPiece> PiecesFor(const JobModel& model, const OwnedShards& owned,
                                     const step::Layout& contributions);

}  // namespace orlop::server
