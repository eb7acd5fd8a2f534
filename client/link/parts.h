// The arguments of the data and step calls. Parts describe boxes of tensors in the worker's memory.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "base/box.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/types.pb.h"

namespace orlop::client {

using Milliseconds = std::chrono::milliseconds;

// A box of one slot to send. `data` is not copied: the caller must not change it until the call
// returns, or until PendingPush::Wait returns.
struct PushPart {
  // Index in the manifest.
  uint32_t tensor = 0;
  // Empty: "gradient" in Push, "weight" in SetState.
  std::string slot;
  // Type of `data`. UNSPECIFIED: the tensor's type in the manifest.
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  // Absent: the whole tensor.
  std::optional<Box> box;
  // The box's elements in row-major order, little endian, and nothing else. Data of DTYPE_I8_BLOCK
  // are encoded piece by piece (client/lanes/pieces.h).
  absl::Span<const std::byte> data;
  // For SetState only: the number of updates the tensor has received (for bias correction).
  std::optional<uint64_t> applied_count;
};

// A box of one slot to fetch into the caller's memory. After an error the contents of `data` are
// unspecified.
struct PullPart {
  // Index in the manifest.
  uint32_t tensor = 0;
  // Empty: "weight".
  std::string slot;
  // Type wanted in `data`. UNSPECIFIED: the tensor's type in the manifest.
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  // Absent: the whole tensor.
  std::optional<Box> box;
  // Receives the box's elements in row-major order, little endian. Its size must be exactly theirs.
  absl::Span<std::byte> data;
};

// The step attempt that a push belongs to. An absent step is the session's committed step + 1, an
// absent attempt the session's open one.
struct PushOptions {
  std::optional<int64_t> step;
  std::optional<uint32_t> attempt;
  // The factor that the gradients were multiplied by. All pushes of an attempt have the same.
  double loss_scale = 1;
  // Absent: data_timeout plus the time for the bytes (ClientOptions).
  std::optional<Milliseconds> timeout;
};

struct PullOptions {
  // The step whose version is wanted. Absent: the session's committed step.
  std::optional<int64_t> version;
  // If true, pulls the step that is committed now, by whichever worker; all parts have one version.
  // If the job steps faster than the bytes arrive, the client holds the job (Session::Hold)
  // meanwhile.
  bool latest = false;
  // Absent: as in PushOptions. A pull of the version after the current one waits at most this long.
  std::optional<Milliseconds> timeout;
};

// What one push or pull moved.
struct Transfer {
  // Pull: the version received. Push: the step pushed to.
  int64_t version = -1;
  // Number of (part, shard) pairs.
  uint64_t pieces = 0;
  // Payload bytes.
  uint64_t bytes = 0;
};

struct CommitOptions {
  // Absent: the session's committed step + 1.
  std::optional<int64_t> step;
  // Absent: the open attempt.
  std::optional<uint32_t> attempt;
  v1::CommitStepRequest::Kind kind = v1::CommitStepRequest::STEP;
  // For kind STEP: the hyper-parameters of each configured group, in the groups' order.
  std::vector<v1::GroupValues> groups;
  // Manifest indexes of tensors in this contributor's layout that got no gradient in this step.
  std::vector<uint32_t> absent_tensors;
  // As in PushOptions.
  double loss_scale = 1;
  // Absent: ClientOptions::control_timeout.
  std::optional<Milliseconds> timeout;
};

struct JoinOptions {
  // The number that StartGeneration returned to rank 0.
  uint64_t generation = 0;
  uint32_t rank = 0;
  uint32_t world_size = 1;
  // May have any size; the client sends it in pages.
  v1::ContributionLayout layout;
  // The highest step this worker saw committed. If the job is below it, Join returns DataLoss.
  std::optional<int64_t> min_committed_step;
  // How long to wait for all ranks. Absent: ClientOptions::control_timeout.
  std::optional<Milliseconds> timeout;
};

// Sums since the session began or since TakeTimings. Seconds are the wall time of calls, so
// overlapping calls add up to more than the time that passed.
struct Timings {
  uint64_t push_bytes = 0;
  uint64_t pull_bytes = 0;
  // From PushAsync to the last server's answer.
  double push_seconds = 0;
  double pull_seconds = 0;
  double commit_seconds = 0;
  uint64_t push_calls = 0;
  uint64_t pull_calls = 0;
  uint64_t commit_calls = 0;
  // Retries of any RPC of the client.
  uint64_t retries = 0;
};

}  // namespace orlop::client
