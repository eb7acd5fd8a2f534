// How the ranks of a new generation come together: each joins with its part of the contribution
// layout, and the layout is whole when every rank has. Also which client holds which rank: the
// first one to ask for it. A part of the leader's state, pure as it is.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "server/step/actions.h"
#include "server/step/layout.h"
#include "server/step/requests.h"

namespace orlop::step {

class Gathering {
 public:
  // Requests that a join ends, each with the reason.
  using Refusals = std::vector<std::pair<RequestId, absl::Status>>;

  // Gives the join's rank to its client, for as long as no newer generation is asked for. Joins of
  // generation 0 or of one that was never issued, or is superseded, are left to Check.
  //   Status  AlreadyExists: another client holds the rank.
  absl::Status Claim(const JoinRequest& join, int64_t issued);
  std::vector<Rank> claimed_ranks() const;  // of the newest generation asked for, ascending

  // Whether a join is well formed and not too late. `issued` is the newest generation that was ever
  // issued, `formed` the one that contributes now.
  //   Status  InvalidArgument: bad rank or world size. FailedPrecondition: the generation was never
  //           issued, or a newer one has formed or is forming.
  absl::Status Check(const JoinRequest& join, int64_t issued, int64_t formed) const;

  // Adds one rank's part of a generation that has not formed. A newer generation than the one that
  // is forming replaces it. If the rank is the last one, the layout is validated. A layout of more
  // than `max_bytes` (EncodedBytes) is refused.
  Refusals Add(RequestId request, const JoinRequest& join, const std::vector<TensorSpec>& tensors,
               uint64_t max_bytes);

  int64_t generation() const { return generation_; }  // that is forming; 0: none
  // The whole layout of generation(), once every rank has joined and it is valid; else null.
  const std::shared_ptr<const Layout>& layout() const { return layout_; }

  // Ends the forming. Returns the requests of the ranks that have joined.
  std::vector<RequestId> Finish();

 private:
  void Begin(int64_t generation, int world_size);

  int64_t claimed_generation_ = 0;
  std::map<Rank, std::string> client_of_rank_;  // of claimed_generation_

  int64_t generation_ = 0;
  std::vector<std::optional<std::vector<Contribution>>> by_rank_;
  std::vector<RequestId> waiting_;
  std::shared_ptr<const Layout> layout_;
};

// AlreadyExists if `join` repeats a rank of the formed `layout` with other contributions.
absl::Status CheckRepeatedJoin(const JoinRequest& join, const Layout& layout);

}  // namespace orlop::step
