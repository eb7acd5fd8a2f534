// How a decision record is built once every contributor has committed and every shard is staged,
// and what makes the CommitSteps of an attempt agree. Pure functions; the leader keeps the state.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/step/job.h"
#include "server/step/messages.h"
#include "server/step/requests.h"

namespace orlop::step {

// An attempt that is ready to be decided. The pointers outlive the call.
struct DecisionInputs {
  const JobSpec* spec = nullptr;
  int64_t epoch = 0;
  int64_t generation = 0;
  int64_t step = 0;
  int64_t attempt = 0;
  DecisionPtr previous;                     // made step - 1; null for the first LOAD
  const CommitRequest* commit = nullptr;    // of any contributor: they agree
  int contributor_count = 0;                // world size
  std::vector<const StageReport*> reports;  // by server; null: the server holds no in-sync copy
};

// The decision record of the attempt: LOAD if the contributors committed one, SKIP if any gradient
// value is not finite, else APPLY with the scalars that `build_scalars` computes.
//   Status  DataLoss: two copies of a shard staged different bytes. InvalidArgument: the gradients
//           carry another loss scale than CommitStep, or a LOAD gives a tensor two applied_counts.
//           Errors of `build_scalars` are returned unchanged.
absl::StatusOr<DecisionPtr> BuildDecision(const DecisionInputs& inputs,
                                          const ScalarBuilder& build_scalars);

// InvalidArgument naming the first hyper-parameter in which `commit` differs from `before`.
absl::Status CompareGroups(const CommitRequest& commit, const CommitRequest& before);

// Whether `commit` agrees with the CommitSteps of its attempt that have arrived: `by_rank` holds
// one entry for each rank, null if the rank has not committed.
//   Status  InvalidArgument: the rank or an absent tensor is unknown; the kind, the loss scale or a
//           hyper-parameter differs from another rank's. AlreadyExists: the same rank has committed
//           this attempt with other values.
absl::Status CompareCommits(const JobSpec& spec, const CommitRequest& commit,
                            const std::vector<const CommitRequest*>& by_rank);

}  // namespace orlop::step
