// What a worker hands to the data calls: parts of tensors over its own memory.
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

// A box of one slot to send. `data` is the caller's and is not copied: it must stay as it is until
// the call, or the PendingPush, is over.
struct PushPart {
  uint32_t tensor = 0;                      // index in the manifest
  std::string slot;                         // empty: "gradient" in Push, "weight" in SetState
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;  // of `data`; UNSPECIFIED: the manifest's
  std::optional<Box> box;                   // absent: the whole tensor
  absl::Span<const std::byte>
      data;  // the box's elements in row-major order, little endian, exactly its size; I8_BLOCK:
             // encoded piece by piece (client/lanes/pieces.h)
  std::optional<uint64_t>
      applied_count;  // SetState only: updates the tensor has seen (bias correction)
};

// A box of one slot to fetch into the caller's memory. After an error the contents of `data` are
// unspecified.
struct PullPart {
  uint32_t tensor = 0;                      // index in the manifest
  std::string slot;                         // empty: "weight"
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;  // wanted in `data`; UNSPECIFIED: the manifest's
  std::optional<Box> box;                   // absent: the whole tensor
  absl::Span<std::byte> data;  // room for the box's elements in row-major order, exactly its size
};

// Which step attempt a push belongs to. Absent values are the session's own (committed step + 1,
// the open attempt).
struct PushOptions {
  std::optional<int64_t> step;
  std::optional<uint32_t> attempt;
  double loss_scale = 1;                // gradients were multiplied by it; one value per attempt
  std::optional<Milliseconds> timeout;  // absent: ClientOptions' base, plus the time of the bytes
                                        // at the slowest rate allowed
};

struct PullOptions {
  std::optional<int64_t> version;  // exact step; absent: the session's committed step
  // The step committed now, whoever makes it: one version of all parts. A job that steps faster
  // than the bytes come is held for the moment.
  bool latest = false;
  std::optional<Milliseconds>
      timeout;  // as above; a pull of the version after the current one waits this long
};

// What one push or pull moved.
struct Transfer {
  int64_t version = -1;  // Pull: the version served; Push: the step pushed to
  uint64_t pieces = 0;   // (part, shard) pairs
  uint64_t bytes = 0;    // of payload
};

struct CommitOptions {
  std::optional<int64_t> step;      // absent: committed step + 1
  std::optional<uint32_t> attempt;  // absent: the open one
  v1::CommitStepRequest::Kind kind = v1::CommitStepRequest::STEP;
  std::vector<v1::GroupValues> groups;  // STEP: one per configured group, in order
  std::vector<uint32_t>
      absent_tensors;     // manifest indexes of this contributor's layout that got no gradient
  double loss_scale = 1;  // as in the pushes
  std::optional<Milliseconds> timeout;  // absent: ClientOptions::control_timeout
};

struct JoinOptions {
  uint64_t generation = 0;  // from Session::StartGeneration of rank 0
  uint32_t rank = 0;
  uint32_t world_size = 1;
  v1::ContributionLayout layout;              // of any size: paged here
  std::optional<int64_t> min_committed_step;  // highest commit this worker saw
  std::optional<Milliseconds>
      timeout;  // for all ranks to arrive; absent: ClientOptions::control_timeout
};

// Sums since the session began, or since TakeTimings. Seconds are wall time of the calls, so
// overlapping calls add up to more than the clock.
struct Timings {
  uint64_t push_bytes = 0;
  uint64_t pull_bytes = 0;
  double push_seconds = 0;  // from PushAsync to the last answer
  double pull_seconds = 0;
  double commit_seconds = 0;
  uint64_t push_calls = 0;
  uint64_t pull_calls = 0;
  uint64_t commit_calls = 0;
  uint64_t retries = 0;  // of any RPC of the client
};

}  // namespace orlop::client
