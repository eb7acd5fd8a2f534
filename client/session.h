// One worker's door to one job: its manifest, its placement, its place in the protocol, and the
// calls that move bytes and steps.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/lanes/pending_push.h"
#include "client/link/manifest.h"
#include "client/link/parts.h"

namespace orlop::client {

class Link;
struct Piece;

// Where the session stands.
struct StepState {
  uint64_t epoch = 0;
  uint64_t generation = 0;  // 0: not joined
  uint32_t rank = 0;
  int64_t committed_step = -1;  // -1: LOADING, the next step is LOAD step 0
  uint32_t attempt = 0;         // open attempt of committed_step + 1; 0: not joined
};

// Threads: every method may be called from any thread at the same time; no lock is held during an
// RPC. Calls block (Python releases its lock around them). The session owns one sending thread per
// connection and server, joined by the destructor; Pull uses threads of its own that end with the
// call.
//
// Errors: the code and, as a payload, the v1::ErrorDetail of the server's answer (proto/status.h);
// messages name server and tensor. Retries are the client's own (client/link/retry.h): what is returned
// has been given up. A caller meets
//   Aborted             STALE_ATTEMPT: push the step again; state().attempt is the open attempt
//   already FailedPrecondition  STALE_GENERATION: join again; WRONG_STEP: see state() after
//   Refresh(); LOADING: load weights first OutOfRange          VERSION_GONE: the version asked is
//   applied over, ErrorDetail.version is current DeadlineExceeded, Unavailable, ResourceExhausted
//   time or the retry budget is used up; the message tells the last error. A commit
//                       may still have happened: repeat it to know
//   InvalidArgument, NotFound, AlreadyExists, DataLoss  not retried
class Session {
 public:
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const std::string& job() const;
  const Manifest& manifest() const;  // fixed for the life of the job
  bool existed() const;              // the job was there before CreateJob, or was attached
  StepState state() const;
  v1::PlacementMap placement() const;  // a copy, all runs

  // Says which optimizer every parameter has (request.job is filled in). True if this changed the
  // job. See Job.ConfigureOptimizer.
  absl::StatusOr<bool> ConfigureOptimizer(v1::ConfigureOptimizerRequest request);
  // Optimizer configured now, by anyone; absent: none.
  absl::StatusOr<std::optional<v1::ConfigureOptimizerRequest>> GetOptimizer();

  // Rank 0: a new generation, to be told to the other ranks, then given to Join by all.
  absl::StatusOr<uint64_t> StartGeneration(
      uint32_t world_size, std::optional<int64_t> min_committed_step = std::nullopt);
  // Becomes contributor `rank`; returns when all ranks have joined. state() is fresh afterwards.
  absl::StatusOr<StepState> Join(const JoinOptions& options);

  // Sends gradients of the open attempt: splits every part by shard and owner and sends to all
  // owners at once. Returns when every piece is stored by its server. Parts must be disjoint and
  // within the layout of Join.
  absl::StatusOr<Transfer> Push(absl::Span<const PushPart> parts, const PushOptions& options = {});
  // The same without waiting. Errors found before anything is sent (sizes, unknown tensors) are
  // returned here.
  absl::StatusOr<std::unique_ptr<PendingPush>> PushAsync(absl::Span<const PushPart> parts,
                                                         const PushOptions& options = {});
  // Stages new contents of slots for a LOAD step (then Commit with kind LOAD). Otherwise as Push.
  absl::StatusOr<Transfer> SetState(absl::Span<const PushPart> parts,
                                    const PushOptions& options = {});
  // Fetches parts of one version into the caller's memory, verifying every checksum and digest.
  // With PullOptions::latest, VERSION_GONE is answered by the next version, a few times.
  absl::StatusOr<Transfer> Pull(absl::Span<const PullPart> parts, const PullOptions& options = {});

  // Says that this contributor has sent all of the step; waits for the decision and the commit.
  // Updates state().
  absl::StatusOr<v1::CommitStepResponse> Commit(const CommitOptions& options);
  // Drops the open attempt (or the one named). Returns the attempt open now, also in state().
  absl::StatusOr<uint32_t> Abort(std::string_view reason,
                                 std::optional<uint32_t> attempt = std::nullopt);
  // Keeps version `step` readable for `duration` (at most 10 minutes, 0 releases).
  absl::Status Hold(int64_t step, Milliseconds duration, std::string_view holder);
  absl::StatusOr<v1::JobStatusResponse> Status();
  // Reads placement and step state again from the servers.
  absl::Status Refresh();

  Timings timings() const;
  Timings TakeTimings();  // returns and sets to zero

 private:
  friend class Client;
  class Core;
  explicit Session(std::unique_ptr<Core> core);
  absl::StatusOr<Transfer> PullLatest(const std::vector<Piece>& pieces,
                                      std::optional<Milliseconds> timeout);
  // Reads manifest, placement and step state of a job.
  static absl::StatusOr<std::unique_ptr<Session>> Open(std::shared_ptr<Link> link,
                                                       std::string_view job, bool existed);
  std::unique_ptr<Core> core_;
};

}  // namespace orlop::client
