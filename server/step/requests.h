// The requests of workers to a job's step leader: plain structs, filled in by the shell.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/step/layout.h"
#include "server/step/messages.h"

namespace orlop::step {

// A hyper-parameter. All contributors must send the same bits; an error names one that differs.
struct HyperParameter {
  std::string name;   // "lr", "betas[0]", ...
  uint64_t bits = 0;  // of the fp64 value
  friend bool operator==(const HyperParameter&, const HyperParameter&) = default;
};

struct ParameterGroup {
  std::vector<HyperParameter> values;
  friend bool operator==(const ParameterGroup&, const ParameterGroup&) = default;
};

// The inputs of a ScalarBuilder. The pointers are valid during the call.
struct ScalarInputs {
  int64_t step = 0;
  const std::vector<ParameterGroup>* groups = nullptr;
  const std::vector<int64_t>* applied_count = nullptr;  // per tensor, counting this APPLY
  const std::vector<uint8_t>* untouched = nullptr;      // per tensor
  double sum_of_squares = 0.0;  // of the raw (scaled, summed) gradient, shards in manifest order
  double scale = 1.0;           // to be divided out
  int contributor_count = 0;    // world size
};
// Computes the opaque scalars of a decision record: the only arithmetic of the optimizer the leader
// needs. Must be a pure function. An error refuses the step: it is every CommitStep's answer, and
// the attempt stays open.
using ScalarBuilder = std::function<absl::StatusOr<std::string>(const ScalarInputs&)>;

struct JoinRequest {
  Rank rank = 0;
  int world_size = 1;
  int64_t generation = 0;  // 0, from rank 0: issue a new one (answered at once, joins nothing)
  std::vector<Contribution> contributions;  // generation > 0: this rank's part of the layout
  int64_t min_committed_step = kLoading;    // highest commit this worker has seen
  std::string client;  // names the process: another process cannot take a rank that is held
};

struct CommitRequest {
  Rank rank = 0;
  int64_t epoch = 0;  // the worker's; 0: not given. An older one is refused: its attempts are gone
  int64_t generation = 0;
  int64_t step = 0;  // the step to make
  int64_t attempt = 0;
  bool is_load = false;
  std::vector<ParameterGroup> groups;  // empty for LOAD
  std::vector<TensorId> absent;        // no gradient from this rank; ascending; empty for LOAD
  double scale = 1.0;
};

struct AbortRequest {
  int64_t epoch = 0;  // the worker's; 0: not given
  int64_t generation = 0;
  int64_t step = 0;
  int64_t attempt = 0;
};

}  // namespace orlop::step
