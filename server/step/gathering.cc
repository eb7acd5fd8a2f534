#include "server/step/gathering.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/step/actions.h"
#include "server/step/layout.h"
#include "server/step/reason.h"
#include "server/step/requests.h"

namespace orlop::step {
namespace {

absl::Status Stale(const std::string& text) {
  return Because(Reason::kStaleGeneration, absl::FailedPreconditionError(text));
}

absl::Status AnotherLayout(const JoinRequest& join) {
  return absl::AlreadyExistsError(absl::StrCat("rank ", join.rank, " of generation ",
                                               join.generation, " has joined with another layout"));
}

}  // namespace

absl::Status CheckRepeatedJoin(const JoinRequest& join, const Layout& layout) {
  const bool same =
      join.world_size == layout.world_size() &&
      DigestContributions(layout.by_rank[join.rank]) == DigestContributions(join.contributions);
  return same ? absl::OkStatus() : AnotherLayout(join);
}

absl::Status Gathering::Claim(const JoinRequest& join, int64_t issued) {
  if (join.generation <= 0 || join.generation > issued) return absl::OkStatus();
  if (join.generation < claimed_generation_) return absl::OkStatus();
  if (join.generation > claimed_generation_) {
    claimed_generation_ = join.generation;
    client_of_rank_.clear();
  }
  const std::string& first = client_of_rank_.try_emplace(join.rank, join.client).first->second;
  if (first == join.client) return absl::OkStatus();
  return absl::AlreadyExistsError(absl::StrCat("rank ", join.rank, " of generation ",
                                               join.generation, " is held by another process ('",
                                               first, "')"));
}

std::vector<Rank> Gathering::claimed_ranks() const {
  std::vector<Rank> ranks;
  ranks.reserve(client_of_rank_.size());
  for (const auto& [rank, client] : client_of_rank_) ranks.push_back(rank);
  return ranks;
}

absl::Status Gathering::Check(const JoinRequest& join, int64_t issued, int64_t formed) const {
  if (join.world_size < 1 || join.rank < 0 || join.rank >= join.world_size ||
      (join.generation == 0 && join.rank != 0)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rank ", join.rank, " of a world of ", join.world_size, ", generation ", join.generation));
  }
  if (join.generation < 0 || join.generation > issued) {
    return Stale(absl::StrCat("generation ", join.generation, " was never issued"));
  }
  const int64_t newest = std::max(formed, generation_);
  if (join.generation == 0 || join.generation >= newest) return absl::OkStatus();
  return Stale(absl::StrCat("generation ", join.generation, " is superseded by ", newest));
}

void Gathering::Begin(int64_t generation, int world_size) {
  Finish();
  generation_ = generation;
  by_rank_.resize(world_size);
}

std::vector<RequestId> Gathering::Finish() {
  generation_ = 0;
  by_rank_.clear();
  layout_ = nullptr;
  return std::exchange(waiting_, {});
}

Gathering::Refusals Gathering::Add(RequestId request, const JoinRequest& join,
                                   const std::vector<TensorSpec>& tensors, uint64_t max_bytes) {
  Refusals refusals;
  const auto refuse_all = [&](const absl::Status& status) {
    for (RequestId waiting : std::exchange(waiting_, {})) refusals.emplace_back(waiting, status);
  };
  if (generation_ != join.generation) {
    refuse_all(Stale(absl::StrCat("superseded by generation ", join.generation)));
    Begin(join.generation, join.world_size);
  }
  if (join.world_size != static_cast<int>(by_rank_.size())) {
    refusals.emplace_back(
        request, absl::InvalidArgumentError(absl::StrCat("world size ", join.world_size,
                                                         ", other ranks said ", by_rank_.size())));
    return refusals;
  }
  auto& part = by_rank_[join.rank];
  if (part.has_value() && DigestContributions(*part) != DigestContributions(join.contributions)) {
    refusals.emplace_back(request, AnotherLayout(join));
    return refusals;
  }
  part = join.contributions;
  waiting_.push_back(request);
  for (const auto& other : by_rank_) {
    if (!other.has_value()) return refusals;
  }
  auto layout = std::make_shared<Layout>();
  for (const auto& other : by_rank_) layout->by_rank.push_back(*other);
  layout->digest = DigestLayout(layout->by_rank);
  absl::Status status = ValidateLayout(tensors, *layout);
  if (const uint64_t bytes = EncodedBytes(*layout); status.ok() && bytes > max_bytes) {
    status = absl::ResourceExhaustedError(absl::StrCat(
        "the layout of ", join.world_size, " ranks and ", tensors.size(), " tensors takes ", bytes,
        " bytes in a message between servers; the limit is ", max_bytes,
        ": use fewer ranks or tensors, or let each rank contribute fewer of them"));
  }
  if (!status.ok()) {
    refuse_all(status);
    Finish();
    return refusals;
  }
  layout_ = std::move(layout);
  return refusals;
}

}  // namespace orlop::step
