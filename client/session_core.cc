#include "client/session_core.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "client/lanes/push_queue.h"
#include "client/lanes/rounds.h"
#include "client/link/link.h"
#include "client/link/manifest.h"
#include "client/link/parts.h"
#include "client/link/placement.h"
#include "client/link/retry.h"
#include "client/session.h"
#include "orlop/v1/job.grpc.pb.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"

namespace orlop::client {
namespace {

std::string RandomId() {
  std::random_device random;
  return absl::StrCat(absl::Hex(random(), absl::kZeroPad8), absl::Hex(random(), absl::kZeroPad8));
}

}  // namespace

Session::Core::Core(std::shared_ptr<Link> link, std::string job, Manifest manifest, bool existed)
    : link(std::move(link)),
      job(std::move(job)),
      subject(absl::StrCat("job ", this->job)),
      manifest(std::move(manifest)),
      existed(existed),
      client_id(RandomId()) {
  pushes_ =
      std::make_unique<PushEngine>(door(), [this](const absl::StatusOr<Transfer>& outcome,
                                                  double seconds) { AddPush(outcome, seconds); });
}

Session::Core::~Core() {
  cancels_.CancelAll();
  pushes_.reset();
}

DataDoor Session::Core::door() {
  return {link.get(),
          job,
          &manifest,
          &cancels_,
          [this] { return placement(); },
          [this] { return RefreshPlacement(); }};
}

StepState Session::Core::state() const {
  MutexLock lock(&mutex_);
  return state_;
}

std::shared_ptr<const Placement> Session::Core::placement() const {
  MutexLock lock(&mutex_);
  return placement_;
}

Timings Session::Core::timings(bool reset) {
  const uint64_t spent = link->budget()->spent();
  MutexLock lock(&mutex_);
  Timings now = timings_;
  now.retries = spent - retries_before_;
  if (reset) {
    timings_ = {};
    retries_before_ = spent;
  }
  return now;
}

absl::Status Session::Core::RefreshPlacement() { return AdoptPlacement({}, 0); }

absl::Status Session::Core::AdoptPlacement(v1::PlacementMap map, uint64_t next) {
  while (map.runs().empty() || next != 0) {
    v1::GetPlacementRequest request;
    request.set_job(job);
    request.set_first(next);
    auto page = CallLeader(Rpc::kRead, &v1::Job::StubInterface::GetPlacement, request);
    if (!page.ok()) return page.status();
    // The epoch changed between two pages: start again.
    if (!map.runs().empty() && page->placement().epoch() != map.epoch()) {
      map.Clear();
      next = 0;
      continue;
    }
    if (map.runs().empty())
      map = *page->mutable_placement();
    else
      map.mutable_runs()->MergeFrom(page->placement().runs());
    next = page->next();
    // The job has no tensors, or the answer lacks them; Build below decides.
    if (map.runs().empty()) break;
  }
  auto built = Placement::Build(std::move(map), manifest);
  if (!built.ok()) return built.status();
  link->SetServers({(*built)->map().servers().begin(), (*built)->map().servers().end()});
  MutexLock lock(&mutex_);
  placement_ = *std::move(built);
  state_.epoch = std::max(state_.epoch, placement_->epoch());
  return absl::OkStatus();
}

absl::Status Session::Core::RefreshState() {
  v1::JobStatusRequest request;
  request.set_job(job);
  auto status = CallLeader(Rpc::kRead, &v1::Job::StubInterface::JobStatus, request);
  if (!status.ok()) return status.status();
  MutexLock lock(&mutex_);
  state_.committed_step = status->committed_step();
  state_.epoch = std::max(state_.epoch, status->epoch());
  // The session stays in the generation it joined. If a newer one exists, the servers will refuse
  // this session's calls.
  if (state_.generation == status->generation()) state_.attempt = status->attempt();
  return absl::OkStatus();
}

void Session::Core::AdoptCommit(const v1::CommitStepResponse& response) {
  MutexLock lock(&mutex_);
  // This is the answer to an older repeat.
  if (response.step() < state_.committed_step) return;
  state_.committed_step = response.step();
  state_.attempt = response.next_attempt();
  state_.epoch = std::max(state_.epoch, response.epoch());
}

void Session::Core::AdoptJoin(const v1::JoinResponse& response, uint32_t rank) {
  MutexLock lock(&mutex_);
  state_ = {response.epoch(), response.generation(), rank, response.committed_step(),
            response.attempt()};
}

void Session::Core::SetAttempt(uint32_t attempt) {
  MutexLock lock(&mutex_);
  state_.attempt = attempt;
}

void Session::Core::LearnFrom(const absl::Status& status) {
  const v1::ErrorDetail detail = DetailOf(status);
  if (detail.reason() == v1::ErrorDetail::STALE_ATTEMPT && detail.attempt() != 0)
    SetAttempt(detail.attempt());
}

void Session::Core::AddPush(const absl::StatusOr<Transfer>& outcome, double seconds) {
  LearnFrom(outcome.status());
  MutexLock lock(&mutex_);
  timings_.push_seconds += seconds;
  timings_.push_calls += 1;
  timings_.push_bytes += outcome.ok() ? outcome->bytes : 0;
}

void Session::Core::AddPull(const absl::StatusOr<Transfer>& outcome, double seconds) {
  MutexLock lock(&mutex_);
  timings_.pull_seconds += seconds;
  timings_.pull_calls += 1;
  timings_.pull_bytes += outcome.ok() ? outcome->bytes : 0;
}

void Session::Core::AddCommit(double seconds) {
  MutexLock lock(&mutex_);
  timings_.commit_seconds += seconds;
  timings_.commit_calls += 1;
}

}  // namespace orlop::client
