#include "client/session.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "client/lanes/grpc_pull.h"
#include "client/lanes/pieces.h"
#include "client/lanes/push_queue.h"
#include "client/lanes/rounds.h"
#include "client/link/link.h"
#include "client/link/pages.h"
#include "client/link/retry.h"
#include "client/session_core.h"
#include "orlop/v1/job.grpc.pb.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"

namespace orlop::client {
namespace {

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// gRPC slices take no const pointer. A push only reads the bytes.
char* Bytes(absl::Span<const std::byte> data) {
  return const_cast<char*>(reinterpret_cast<const char*>(data.data()));
}

absl::StatusOr<std::vector<Piece>> Split(absl::Span<const PushPart> parts, const Manifest& manifest,
                                         std::string_view slot) {
  std::vector<Piece> pieces;
  for (const PushPart& part : parts) {
    const PartView view{part.tensor,       part.slot.empty() ? slot : part.slot,
                        part.dtype,        &part.box,
                        Bytes(part.data),  part.data.size(),
                        part.applied_count};
    if (absl::Status status = SplitPart(view, manifest, &pieces); !status.ok()) return status;
  }
  return pieces;
}

absl::StatusOr<std::vector<Piece>> Split(absl::Span<const PullPart> parts,
                                         const Manifest& manifest) {
  std::vector<Piece> pieces;
  for (const PullPart& part : parts) {
    const PartView view{
        part.tensor,
        part.slot.empty() ? std::string_view("weight") : std::string_view(part.slot),
        part.dtype,
        &part.box,
        reinterpret_cast<char*>(part.data.data()),
        part.data.size(),
        std::nullopt};
    if (absl::Status status = SplitPart(view, manifest, &pieces); !status.ok()) return status;
  }
  return pieces;
}

// A `latest` pull holds the job after kFreeTries attempts and gives up after kLatestTries.
constexpr int kFreeTries = 3, kLatestTries = 16;
// A hold expires after this time, in case the client dies.
constexpr Milliseconds kPullHold{10'000};

absl::Status NothingCommitted(const v1::JobStatusResponse& status) {
  if (status.state() == v1::JobStatusResponse::RECOVERING ||
      status.state() == v1::JobStatusResponse::WAITING)
    return absl::UnavailableError(
        absl::StrCat("job ", status.job(), " recovers: ", status.explanation()));
  return MakeError(absl::StatusCode::kFailedPrecondition,
                   absl::StrCat("job ", status.job(), " has no weights yet"),
                   v1::ErrorDetail::LOADING);
}

PushKey KeyFor(const StepState& state, const PushOptions& options, bool set_state) {
  return {set_state,
          options.step.value_or(state.committed_step + 1),
          options.attempt.value_or(state.attempt),
          state.generation,
          state.rank,
          options.loss_scale};
}

}  // namespace

Session::Session(std::unique_ptr<Core> core) : core_(std::move(core)) {}
Session::~Session() = default;

absl::StatusOr<std::unique_ptr<Session>> Session::Open(std::shared_ptr<Link> link,
                                                       std::string_view job, bool existed) {
  absl::StatusOr<Manifest> manifest = ReadManifest(link.get(), job);
  if (!manifest.ok()) return manifest.status();
  auto core =
      std::make_unique<Core>(std::move(link), std::string(job), *std::move(manifest), existed);
  if (absl::Status status = core->RefreshPlacement(); !status.ok()) return status;
  if (absl::Status status = core->RefreshState(); !status.ok()) return status;
  return std::unique_ptr<Session>(new Session(std::move(core)));
}

const std::string& Session::job() const { return core_->job; }
const Manifest& Session::manifest() const { return core_->manifest; }
bool Session::existed() const { return core_->existed; }
StepState Session::state() const { return core_->state(); }
v1::PlacementMap Session::placement() const { return core_->placement()->map(); }
Timings Session::timings() const { return core_->timings(false); }
Timings Session::TakeTimings() { return core_->timings(true); }

absl::StatusOr<bool> Session::ConfigureOptimizer(v1::ConfigureOptimizerRequest request) {
  request.set_job(core_->job);
  auto response =
      core_->CallLeader(Rpc::kChange, &v1::Job::StubInterface::ConfigureOptimizer, request);
  if (!response.ok()) return response.status();
  return response->changed();
}

absl::StatusOr<std::optional<v1::ConfigureOptimizerRequest>> Session::GetOptimizer() {
  v1::GetManifestRequest request;
  request.set_job(core_->job);
  auto response = core_->CallLeader(Rpc::kRead, &v1::Job::StubInterface::GetManifest, request);
  if (!response.ok()) return response.status();
  if (!response->has_optimizer()) return std::optional<v1::ConfigureOptimizerRequest>();
  return std::optional<v1::ConfigureOptimizerRequest>(std::move(*response->mutable_optimizer()));
}

absl::StatusOr<uint64_t> Session::StartGeneration(uint32_t world_size,
                                                  std::optional<int64_t> min_committed_step) {
  v1::JoinRequest request;
  request.set_job(core_->job);
  request.set_world_size(world_size);
  request.set_client_id(core_->client_id);
  if (min_committed_step) request.set_min_committed_step(*min_committed_step);
  auto response = core_->CallLeader(Rpc::kChange, &v1::Job::StubInterface::Join, request);
  if (!response.ok()) return response.status();
  return response->generation();
}

absl::StatusOr<StepState> Session::Join(const JoinOptions& options) {
  v1::JoinRequest base;
  base.set_job(core_->job);
  base.set_generation(options.generation);
  base.set_rank(options.rank);
  base.set_world_size(options.world_size);
  base.set_client_id(core_->client_id);
  if (options.min_committed_step) base.set_min_committed_step(*options.min_committed_step);
  const std::vector<v1::JoinRequest> pages = JoinPages(base, options.layout);
  absl::StatusOr<v1::JoinResponse> response;
  for (const v1::JoinRequest& page : pages) {
    response =
        core_->CallLeader(Rpc::kChange, &v1::Job::StubInterface::Join, page, options.timeout);
    if (!response.ok()) return response.status();
  }
  core_->AdoptJoin(*response, options.rank);
  absl::Status status = core_->AdoptPlacement(std::move(*response->mutable_placement()),
                                              response->next_placement_run());
  if (!status.ok()) return status;
  return core_->state();
}

absl::StatusOr<std::unique_ptr<PendingPush>> Session::PushAsync(absl::Span<const PushPart> parts,
                                                                const PushOptions& options) {
  absl::StatusOr<std::vector<Piece>> pieces = Split(parts, core_->manifest, "gradient");
  if (!pieces.ok()) return pieces.status();
  return core_->pushes()->Start(KeyFor(core_->state(), options, false), *std::move(pieces),
                                options.timeout);
}

absl::StatusOr<Transfer> Session::Push(absl::Span<const PushPart> parts,
                                       const PushOptions& options) {
  absl::StatusOr<std::unique_ptr<PendingPush>> pending = PushAsync(parts, options);
  if (!pending.ok()) return pending.status();
  return (*pending)->Wait();
}

absl::StatusOr<Transfer> Session::SetState(absl::Span<const PushPart> parts,
                                           const PushOptions& options) {
  absl::StatusOr<std::vector<Piece>> pieces = Split(parts, core_->manifest, "weight");
  if (!pieces.ok()) return pieces.status();
  return core_->pushes()
      ->Start(KeyFor(core_->state(), options, true), *std::move(pieces), options.timeout)
      ->Wait();
}

absl::StatusOr<Transfer> Session::Pull(absl::Span<const PullPart> parts,
                                       const PullOptions& options) {
  const Clock::time_point start = Clock::now();
  absl::StatusOr<std::vector<Piece>> pieces = Split(parts, core_->manifest);
  if (!pieces.ok()) return pieces.status();
  absl::StatusOr<Transfer> outcome =
      options.latest
          ? PullLatest(*pieces, options.timeout)
          : FetchAll(core_->door(), options.version.value_or(core_->state().committed_step),
                     *std::move(pieces), options.timeout);
  core_->AddPull(outcome, SecondsSince(start));
  return outcome;
}

// While a step is applied, servers differ in version by one. So every server is asked for the same
// committed step by number, and for the next one if that was applied over.
absl::StatusOr<Transfer> Session::PullLatest(const std::vector<Piece>& pieces,
                                             std::optional<Milliseconds> timeout) {
  uint64_t bytes = 0;
  for (const Piece& piece : pieces) bytes += piece.bytes;
  const Clock::time_point deadline = DataDeadline(core_->link->options(), timeout, bytes);
  CancelSet never;
  for (int number = 0;; ++number) {
    const absl::StatusOr<v1::JobStatusResponse> status = Status();
    if (!status.ok()) {
      v1::ErrorDetail where;
      where.set_tensor(pieces.empty() ? "" : pieces.front().region.tensor());
      return Annotated(status.status(), absl::StrCat("pull of tensor ", where.tensor()), where);
    }
    const int64_t step = status->committed_step();
    if (step < 0) {
      absl::Status none = NothingCommitted(*status);
      if (!absl::IsUnavailable(none) ||
          !core_->link->PrepareRetry(Verdict::kBackOff, number, deadline, &never))
        return none;
      continue;
    }
    const std::string holder = absl::StrCat("pull ", core_->client_id);
    const bool held = number >= kFreeTries && Hold(step, kPullHold, holder).ok();
    const auto left = std::chrono::duration_cast<Milliseconds>(deadline - Clock::now());
    absl::StatusOr<Transfer> outcome =
        FetchAll(core_->door(), step, pieces, std::max(left, Milliseconds(1)));
    if (held) Hold(step, Milliseconds(0), holder).IgnoreError();
    // A server may learn of the first commit a moment after its leader has answered it.
    if (!outcome.ok() && DetailOf(outcome.status()).reason() == v1::ErrorDetail::LOADING &&
        core_->link->PrepareRetry(Verdict::kBackOff, number, deadline, &never))
      continue;
    if (outcome.ok() || number + 1 == kLatestTries ||
        DetailOf(outcome.status()).reason() != v1::ErrorDetail::VERSION_GONE)
      return outcome;
  }
}

absl::StatusOr<v1::CommitStepResponse> Session::Commit(const CommitOptions& options) {
  const Clock::time_point start = Clock::now(),
                          deadline = start + options.timeout.value_or(
                                                 core_->link->options().control_timeout);
  const StepState state = core_->state();
  v1::CommitStepRequest request;
  request.set_job(core_->job);
  request.set_generation(state.generation);
  request.set_step(options.step.value_or(state.committed_step + 1));
  request.set_attempt(options.attempt.value_or(state.attempt));
  request.set_rank(state.rank);
  request.set_kind(options.kind);
  request.mutable_groups()->Add(options.groups.begin(), options.groups.end());
  request.mutable_absent_tensors()->Add(options.absent_tensors.begin(),
                                        options.absent_tensors.end());
  request.set_loss_scale(options.loss_scale);
  absl::StatusOr<v1::CommitStepResponse> response;
  for (int number = 0;; ++number) {
    request.set_epoch(core_->placement()->epoch());
    const auto left = std::chrono::duration_cast<Milliseconds>(deadline - Clock::now());
    response = core_->CallLeader(Rpc::kCommit, &v1::Job::StubInterface::CommitStep, request,
                                 std::max(left, Milliseconds(1)));
    if (response.ok() || Judge(Rpc::kCommit, response.status()) != Verdict::kRefresh) break;
    CancelSet never;
    if (!core_->link->PrepareRetry(Verdict::kRefresh, number, deadline, &never)) break;
    if (absl::Status status = core_->RefreshPlacement(); !status.ok()) return status;
  }
  core_->AddCommit(SecondsSince(start));
  core_->LearnFrom(response.status());
  if (response.ok()) core_->AdoptCommit(*response);
  return response;
}

absl::StatusOr<uint32_t> Session::Abort(std::string_view reason, std::optional<uint32_t> attempt) {
  const StepState state = core_->state();
  v1::AbortStepRequest request;
  request.set_job(core_->job);
  request.set_generation(state.generation);
  request.set_step(state.committed_step + 1);
  request.set_attempt(attempt.value_or(state.attempt));
  request.set_rank(state.rank);
  request.set_reason(Beginning(reason, kMaxReasonBytes));
  auto response = core_->CallLeader(Rpc::kChange, &v1::Job::StubInterface::AbortStep, request);
  if (!response.ok()) return response.status();
  core_->SetAttempt(response->attempt());
  return response->attempt();
}

absl::Status Session::Hold(int64_t step, Milliseconds duration, std::string_view holder) {
  v1::HoldRequest request;
  request.set_job(core_->job);
  request.set_step(step);
  if (duration.count() < 0 || duration.count() > kMaxHoldMs)
    return MakeError(
        absl::StatusCode::kInvalidArgument,
        absl::StrCat("a hold of ", duration.count(), " ms; the limit is ", kMaxHoldMs, " ms"),
        v1::ErrorDetail::BAD_REQUEST);
  request.set_duration_ms(static_cast<uint32_t>(duration.count()));
  request.set_holder(std::string(holder));
  return core_->CallLeader(Rpc::kChange, &v1::Job::StubInterface::Hold, request).status();
}

absl::StatusOr<v1::JobStatusResponse> Session::Status() {
  v1::JobStatusRequest request;
  request.set_job(core_->job);
  return core_->CallLeader(Rpc::kRead, &v1::Job::StubInterface::JobStatus, request);
}

absl::Status Session::Refresh() {
  if (absl::Status status = core_->RefreshPlacement(); !status.ok()) return status;
  return core_->RefreshState();
}

}  // namespace orlop::client
