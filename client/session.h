// One worker's connection to one job. It holds the job's manifest, its placement map and this
// worker's StepState, and makes the calls that move bytes and steps.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/lanes/pending_push.h"  // IWYU pragma: export
#include "client/link/manifest.h"       // IWYU pragma: export
#include "client/link/parts.h"          // IWYU pragma: export

namespace orlop::client {

class Link;
struct Piece;

// Which step a session pushes to, and as which contributor.
struct StepState {
  uint64_t epoch = 0;
  // Generation this session joined. 0: it has not joined.
  uint64_t generation = 0;
  uint32_t rank = 0;
  // Last step this session knows to be committed. -1: the job is LOADING; its next step is LOAD
  // step 0.
  int64_t committed_step = -1;
  // Open attempt of step committed_step + 1. 0: this session has not joined.
  uint32_t attempt = 0;
};

// Threads: every method may be called from any thread at the same time. No lock is held during an
// RPC. Calls block (Python releases the GIL around them). The session owns one thread that sends
// queued pushes; the destructor joins it. A push or pull also starts a thread for each connection
// and server, and joins it before it completes.
//
// Errors: a Status carries the code and, as a payload, the v1::ErrorDetail of the server's answer
// (proto/status.h). Messages name the server and the tensor. The client has already retried what
// can be retried (client/link/retry.h); an error that a method returns is final:
//   Aborted             STALE_ATTEMPT: push the step again. state().attempt is the open attempt.
//   FailedPrecondition  STALE_GENERATION: join again.
//                       WRONG_STEP: call Refresh(), then see state().
//                       LOADING: load the weights first.
//   OutOfRange          VERSION_GONE: the version asked for was applied over.
//                       ErrorDetail.version is the current one.
//   DeadlineExceeded, Unavailable, ResourceExhausted
//                       The time or the retry budget is used up. The message ends with the last
//                       error. A commit may still have happened: repeat it to find out.
//   InvalidArgument, NotFound, AlreadyExists, DataLoss
//                       The client does not retry these.
class Session {
 public:
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const std::string& job() const;
  // The manifest never changes during the life of the job.
  const Manifest& manifest() const;
  // True if the job existed before CreateJob, or if this session attached to it.
  bool existed() const;
  StepState state() const;
  // Returns a copy of the placement map with all its runs.
  v1::PlacementMap placement() const;

  // Sets the optimizer of every parameter; request.job is filled in. Returns whether this changed
  // the job. For effect and errors see Job.ConfigureOptimizer in job.proto.
  absl::StatusOr<bool> ConfigureOptimizer(v1::ConfigureOptimizerRequest request);
  // Returns the optimizer configuration in force, whoever set it; absent if there is none.
  absl::StatusOr<std::optional<v1::ConfigureOptimizerRequest>> GetOptimizer();

  // Rank 0 calls this to open a new generation. It passes the number to the other ranks, then every
  // rank (0 too) passes it to Join. See Job.Join in job.proto.
  absl::StatusOr<uint64_t> StartGeneration(
      uint32_t world_size, std::optional<int64_t> min_committed_step = std::nullopt);
  // Becomes contributor `rank` and returns when all ranks have joined. state() is then current.
  absl::StatusOr<StepState> Join(const JoinOptions& options);

  // Sends gradients of the open attempt. Splits every part by shard and sends the pieces to all
  // owners at once. Returns when the servers have stored every piece. Parts must be disjoint and
  // within the layout given to Join. Status: see above, and InvalidArgument for a wrong size or an
  // unknown tensor.
  absl::StatusOr<Transfer> Push(absl::Span<const PushPart> parts, const PushOptions& options = {});
  // Starts a Push and returns at once. Errors that need no server (wrong sizes, unknown tensors)
  // are returned here; all others by PendingPush::Wait.
  absl::StatusOr<std::unique_ptr<PendingPush>> PushAsync(absl::Span<const PushPart> parts,
                                                         const PushOptions& options = {});
  // Stages new contents of slots for a LOAD step; CommitOptions::kind LOAD then commits them.
  // Otherwise like Push.
  absl::StatusOr<Transfer> SetState(absl::Span<const PushPart> parts,
                                    const PushOptions& options = {});
  // Fetches parts of one version into the caller's memory and verifies every checksum and digest.
  // With PullOptions::latest the client answers VERSION_GONE by pulling the next version, up to 16
  // times.
  absl::StatusOr<Transfer> Pull(absl::Span<const PullPart> parts, const PullOptions& options = {});

  // Declares that this contributor has sent all of the step, and waits until the step is decided
  // and committed. Updates state().
  absl::StatusOr<v1::CommitStepResponse> Commit(const CommitOptions& options);
  // Drops the open attempt, or the one named. Returns the attempt that is open now; state() has it
  // too.
  absl::StatusOr<uint32_t> Abort(std::string_view reason,
                                 std::optional<uint32_t> attempt = std::nullopt);
  // Keeps version `step` readable for `duration`: at most 10 minutes; 0 releases the hold.
  absl::Status Hold(int64_t step, Milliseconds duration, std::string_view holder);
  absl::StatusOr<v1::JobStatusResponse> Status();
  // Reads the placement map and the step state from the servers again.
  absl::Status Refresh();

  Timings timings() const;
  // Returns the timings and sets them to zero.
  Timings TakeTimings();

 private:
  friend class Client;
  class Core;
  explicit Session(std::unique_ptr<Core> core);
  absl::StatusOr<Transfer> PullLatest(const std::vector<Piece>& pieces,
                                      std::optional<Milliseconds> timeout);
  // Reads manifest, placement and step state of the job.
  static absl::StatusOr<std::unique_ptr<Session>> Open(std::shared_ptr<Link> link,
                                                       std::string_view job, bool existed);
  std::unique_ptr<Core> core_;
};

}  // namespace orlop::client
