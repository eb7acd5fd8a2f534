#include "server/runtime/leader_shell.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "proto/limits.h"
#include "server/job/job_model.h"
#include "server/runtime/environment.h"
#include "server/runtime/job_disk.h"
#include "server/runtime/machine_shell.h"
#include "server/runtime/step_scalars.h"
#include "server/step/actions.h"
#include "server/step/job.h"
#include "server/step/leader.h"
#include "server/step/messages.h"
#include "spdlog/spdlog.h"

namespace orlop::server {

namespace {

// An OpenJob carries the layout and the placement of every shard, and leaves 1 MiB for the rest.
uint64_t MaxLayoutBytes(const JobModel& model) {
  constexpr uint64_t kCopyBytes = 24;  // of a shard with one copy, at most
  return kMaxPeerMessageBytes - (uint64_t{1} << 20) - kCopyBytes * model.spec()->shards.size();
}

}  // namespace

LeaderShell::LeaderShell(const Environment& environment, std::shared_ptr<const JobModel> model,
                         step::JobRecord record, std::weak_ptr<void> owner,
                         std::shared_ptr<JobDisk> disk, std::shared_ptr<LocalMessages> local)
    : MachineShell(environment, model->job(), std::move(disk), std::move(local)),
      owner_(std::move(owner)),
      leader_(model->spec(), environment.self, std::move(record),
              [this](const step::ScalarInputs& inputs)
                  REQUIRES(mutex_) { return ScalarsOf(inputs); },
              {.max_layout_bytes = MaxLayoutBytes(*model)}),
      model_(std::move(model)),
      schedule_(environment.flush_every_ms, now_ms()) {}

// ---- Calls -------------------------------------------------------------------------------------

absl::Status LeaderShell::ClaimRank(const step::JoinRequest& join) {
  MutexLock lock(&mutex_);
  return closed_ ? JobGone() : leader_.ClaimRank(join);
}

step::RequestId LeaderShell::Join(const step::JoinRequest& join, Caller caller) {
  return Ask(std::move(caller), [&](step::RequestId id, int64_t now, step::Actions* actions)
                                    REQUIRES(mutex_) { leader_.OnJoin(id, join, now, actions); });
}

step::RequestId LeaderShell::Commit(const step::CommitRequest& commit, Caller caller) {
  return Ask(std::move(caller),
             [&](step::RequestId id, int64_t now, step::Actions* actions) REQUIRES(mutex_) {
               absl::Status refusal = environment_.data->presence();
               if (is_configuring_) refusal = BeingConfigured();
               if (refusal.ok()) return leader_.OnCommitStep(id, commit, now, actions);
               AnswerCaller({.request = id, .status = std::move(refusal)});
             });
}

step::RequestId LeaderShell::Abort(const step::AbortRequest& abort, Caller caller) {
  return Ask(std::move(caller),
             [&](step::RequestId id, int64_t now, step::Actions* actions)
                 REQUIRES(mutex_) { leader_.OnAbortStep(id, abort, now, actions); });
}

step::RequestId LeaderShell::Hold(const std::string& holder, int64_t step, int64_t duration_ms,
                                  Caller caller) {
  return Ask(std::move(caller),
             [&](step::RequestId id, int64_t now, step::Actions* actions) REQUIRES(mutex_) {
               leader_.OnHold(id, holder, step, now + duration_ms, now, actions);
             });
}

step::RequestId LeaderShell::AcceptRollback(int64_t to_step, Caller caller) {
  return Ask(std::move(caller),
             [&](step::RequestId id, int64_t now, step::Actions* actions)
                 REQUIRES(mutex_) { leader_.OnAcceptRollback(id, to_step, now, actions); });
}

step::RequestId LeaderShell::Flush(Caller caller) {
  return Ask(std::move(caller), [&](step::RequestId id, int64_t now, step::Actions* actions)
                                    REQUIRES(mutex_) { leader_.OnFlush(id, now, actions); });
}

step::RequestId LeaderShell::AwaitRecovery(Caller caller) {
  return Ask(
      std::move(caller),
      [&](step::RequestId id, int64_t, step::Actions*) REQUIRES(mutex_) { recoveries_.insert(id); },
      [this](step::RequestId id, int64_t, step::Actions*)
          REQUIRES(mutex_) { recoveries_.erase(id); });
}

void LeaderShell::AfterEvent() {
  NoteFlush();
  if (recoveries_.empty()) return;
  if (!leader_.serving() && !IsLost()) return;
  for (const step::RequestId id : std::exchange(recoveries_, {})) AnswerCaller({.request = id});
}

step::JobStatusReport LeaderShell::Status() const {
  MutexLock lock(&mutex_);
  step::JobStatusReport report = leader_.Status();
  report.has_lost_memory = IsLost();
  return report;
}

int64_t LeaderShell::epoch() const {
  MutexLock lock(&mutex_);
  return leader_.epoch();
}

bool LeaderShell::HasLostMemory() const {
  MutexLock lock(&mutex_);
  return IsLost();
}

// Whether somebody has to decide what becomes of a job that has lost its memory.
bool LeaderShell::IsLost() const {
  return leader_.has_lost_memory() &&
         !(GoesBackByItself() && !leader_.Status().rollback_offers.empty());
}

// The newest flush that is left may be older than what was acknowledged as being on disk. Then an
// operator decides.
bool LeaderShell::GoesBackByItself() const {
  return environment_.accepts_rollback && !environment_.data->has_lost_writes();
}

// ---- Events ------------------------------------------------------------------------------------

void LeaderShell::OnMessage(int from, const step::Message& message) {
  Complete([&](int64_t now, step::Actions* actions)
               REQUIRES(mutex_) { leader_.OnMessage(from, message, now, actions); });
}

void LeaderShell::Tick() {
  Complete([this](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    *actions = TakeUnsynced();
    leader_.OnTick(now, actions);
  });
  ExpireCallers();
  AcceptRollbackIfTold();
  FlushIfDue();
}

// Says when a flush begins and ends.
void LeaderShell::NoteFlush() {
  if (leader_.is_flushing() == (flush_begin_ms_ > 0)) return;
  const int64_t now = now_ms();
  if (leader_.is_flushing()) {
    flush_begin_ms_ = now;
    flush_step_ = leader_.committed_step();
    return spdlog::info("job {}: step {} is being written to disk on all servers", job_,
                        flush_step_);
  }
  schedule_.Ended(flush_begin_ms_, now);
  const auto seconds = static_cast<double>(now - std::exchange(flush_begin_ms_, 0)) / 1e3;
  const step::RecoverReport::Flush& kept = leader_.kept_flush();
  const bool is_written = !kept.decision.empty() && kept.step == flush_step_;
  spdlog::info("job {}: step {} is {} disk on all servers, after {:.1f} s", job_, flush_step_,
               is_written ? "on" : "not on", seconds);
}

void LeaderShell::FlushIfDue() {
  {
    MutexLock lock(&mutex_);
    const step::RecoverReport::Flush& kept = leader_.kept_flush();
    const int64_t flushed = kept.decision.empty() ? step::kLoading : kept.step;
    if (closed_ || leader_.is_flushing() || !leader_.serving() ||
        !schedule_.IsDue(now_ms(), leader_.committed_step(), flushed))
      return;
  }
  Flush({[job = job_](const absl::StatusOr<step::Answer>& answer) {
    if (!answer.ok())
      spdlog::error("job {}: its state cannot be written to disk: {}", job,
                    std::string(answer.status().message()));
  }});
}

void LeaderShell::AcceptRollbackIfTold() {
  if (!GoesBackByItself()) return;
  int64_t step = 0;
  {
    MutexLock lock(&mutex_);
    if (!leader_.has_lost_memory() || IsLost()) return;
    step = leader_.Status().rollback_offers.front().step;
  }
  spdlog::warn("job {}: its memory is lost; goes back to step {}, the newest that all servers have",
               job_, step);
  AcceptRollback(step, {[job = job_, step](const absl::StatusOr<step::Answer>& answer) {
                   if (!answer.ok())
                     spdlog::error("job {}: cannot go back to step {}: {}", job, step,
                                   std::string(answer.status().message()));
                 }});
}

void LeaderShell::Close() { CloseCallers(); }

bool LeaderShell::BeginConfigure() {
  MutexLock lock(&mutex_);
  if (!leader_.is_deciding()) is_configuring_ = true;
  return is_configuring_;
}

void LeaderShell::EndConfigure(std::shared_ptr<const JobModel> model) {
  MutexLock lock(&mutex_);
  is_configuring_ = false;
  if (model != nullptr) model_ = std::move(model);
}

absl::StatusOr<std::string> LeaderShell::ScalarsOf(const step::ScalarInputs& inputs) {
  if (is_configuring_) return BeingConfigured();  // to commits of before
  if (model_->definition().optimizer().reduce() == "sum") return BuildScalars(*model_, 1, inputs);
  if (counted_layout_ != leader_.layout()) {
    counted_layout_ = leader_.layout();
    contributions_ = ContributionsPerElement(*model_, *counted_layout_);
  }
  if (!contributions_.ok()) return contributions_.status();
  return BuildScalars(*model_, *contributions_, inputs);
}

void LeaderShell::Do(const step::Action& action) {
  const auto* persist = std::get_if<step::PersistRecord>(&action);
  if (persist == nullptr) return spdlog::critical("job {}: an action that no leader has", job_);
  environment_.pool->Submit(
      [this, owner = owner_.lock(), action = *persist] { PersistInPool(action); });
}

void LeaderShell::PersistInPool(const step::PersistRecord& action) {
  const absl::StatusOr<bool> follows = disk_->WriteRecord(action.record);
  Complete([&](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    if (!follows.ok()) return WriteAgain(action);
    leader_.OnRecordPersisted(action.record.version, *follows, now, actions);
  });
}

}  // namespace orlop::server
