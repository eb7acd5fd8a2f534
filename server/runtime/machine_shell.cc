#include "server/runtime/machine_shell.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/job/step_codec.h"
#include "server/runtime/environment.h"
#include "server/runtime/job_disk.h"
#include "server/runtime/wait.h"
#include "server/step/actions.h"
#include "server/step/messages.h"
#include "spdlog/spdlog.h"

namespace orlop::server {

using std::chrono::steady_clock;

void LocalMessages::Add(step::Message message) {
  MutexLock lock(&mutex_);
  waiting_.push_back(std::move(message));
  ++added_;
}

void LocalMessages::Deliver() {
  {
    MutexLock lock(&mutex_);
    if (is_delivering_) return;
    is_delivering_ = true;
  }
  for (;;) {
    step::Message message;
    {
      MutexLock lock(&mutex_);
      if (waiting_.empty()) {
        is_delivering_ = false;
        return;
      }
      message = std::move(waiting_.front());
      waiting_.pop_front();
    }
    deliver_(message);
    MutexLock lock(&mutex_);
    ++delivered_;
    has_delivered_.SignalAll();
  }
}

void LocalMessages::AwaitDelivery() {
  MutexLock lock(&mutex_);
  const uint64_t last = added_;
  while (delivered_ < last) has_delivered_.Wait(&mutex_);
}

MachineShell::MachineShell(const Environment& environment, std::string job,
                           std::shared_ptr<JobDisk> disk, std::shared_ptr<LocalMessages> local)
    : environment_(environment),
      job_(std::move(job)),
      disk_(std::move(disk)),
      local_(std::move(local)) {}

int64_t MachineShell::now_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             steady_clock::now().time_since_epoch())
      .count();
}

absl::Status MachineShell::JobGone() const {
  return MakeError(absl::StatusCode::kNotFound, absl::StrCat("job '", job_, "' was deleted"),
                   v1::ErrorDetail::UNKNOWN_JOB);
}

absl::Status MachineShell::BeingConfigured() const {
  return absl::UnavailableError(absl::StrCat("job '", job_, "' is being configured"));
}

absl::Status MachineShell::DeadlinePassed() const {
  const absl::Status disk = disk_->status();
  return absl::DeadlineExceededError(
      absl::StrCat("job '", job_, "': the deadline passed while waiting",
                   disk.ok() ? "" : " for the disk: ", disk.message()));
}

// ---- Requests ----

step::RequestId MachineShell::Ask(Caller caller, const Event& event, Event on_withdraw) {
  step::RequestId request = 0;
  Outbox outbox;
  {
    MutexLock lock(&mutex_);
    if (closed_) {
      outbox.answers.emplace_back(std::move(caller), JobGone());
    } else {
      request = next_request_++;
      requests_[request] = {std::move(caller), std::move(on_withdraw)};
      step::Actions actions;
      event(request, now_ms(), &actions);
      outbox = Perform(actions);
    }
  }
  Leave(outbox);
  return request;
}

void MachineShell::AnswerCaller(const step::Answer& answer) {
  auto request = requests_.extract(answer.request);
  if (request.empty()) return;
  absl::StatusOr<step::Answer> told = answer;
  if (!answer.status.ok()) told = answer.status;
  outbox_.answers.emplace_back(std::move(request.mapped().caller), std::move(told));
}

void MachineShell::Withdraw(step::RequestId id, const absl::Status& why) {
  Outbox outbox;
  {
    MutexLock lock(&mutex_);
    auto request = requests_.extract(id);
    if (request.empty()) return;
    step::Actions actions;
    if (request.mapped().on_withdraw) request.mapped().on_withdraw(id, now_ms(), &actions);
    outbox = Perform(actions);
    outbox.answers.emplace_back(std::move(request.mapped().caller), why);
  }
  Leave(outbox);
}

void MachineShell::ExpireCallers() {
  std::vector<step::RequestId> late;
  {
    MutexLock lock(&mutex_);
    for (const auto& [id, request] : requests_)
      if (request.caller.deadline < steady_clock::now()) late.push_back(id);
  }
  for (const step::RequestId id : late) Withdraw(id, DeadlinePassed());
}

void MachineShell::CloseCallers() {
  Outbox outbox;
  {
    MutexLock lock(&mutex_);
    closed_ = true;
    for (auto& [id, request] : std::exchange(requests_, {}))
      outbox.answers.emplace_back(std::move(request.caller), JobGone());
  }
  Leave(outbox);
}

absl::StatusOr<step::Answer> MachineShell::Await(
    const Wait& wait, const std::function<step::RequestId(Caller)>& ask) {
  struct Latch {
    Mutex mutex;
    CondVar answered;
    std::optional<absl::StatusOr<step::Answer>> answer GUARDED_BY(mutex);
  };
  const auto latch = std::make_shared<Latch>();
  const step::RequestId request = ask({[latch](absl::StatusOr<step::Answer> answer) {
    MutexLock lock(&latch->mutex);
    latch->answer = std::move(answer);
    latch->answered.SignalAll();
  }});
  {
    MutexLock lock(&latch->mutex);
    while (!latch->answer.has_value() && !wait.is_over()) {
      latch->answered.WaitUntil(&latch->mutex,
                                std::min(wait.deadline, steady_clock::now() + kCancelPoll));
    }
    if (latch->answer.has_value()) return *std::move(latch->answer);
  }
  Withdraw(request, steady_clock::now() < wait.deadline
                        ? absl::CancelledError("the caller went away")
                        : DeadlinePassed());
  MutexLock lock(&latch->mutex);
  while (!latch->answer.has_value()) latch->answered.Wait(&latch->mutex);  // it is on its way
  return *std::move(latch->answer);
}

// ---- Events ----

void MachineShell::Complete(const std::function<void(int64_t, step::Actions*)>& event) {
  Outbox outbox;
  {
    MutexLock lock(&mutex_);
    if (closed_) return;
    step::Actions actions;
    event(now_ms(), &actions);
    outbox = Perform(actions);
  }
  Leave(outbox);
}

// Carries out actions; returns what leaves.
MachineShell::Outbox MachineShell::Perform(const step::Actions& actions) {
  for (const step::Action& action : actions) {
    if (const auto* send = std::get_if<step::Send>(&action)) {
      if (send->to == environment_.self) {
        local_->Add(send->message);
      } else {
        outbox_.messages.push_back(*send);
      }
    } else if (const auto* answer = std::get_if<step::Answer>(&action)) {
      AnswerCaller(*answer);
    } else {
      Do(action);
    }
  }
  AfterEvent();
  return std::exchange(outbox_, {});
}

void MachineShell::Leave(const Outbox& outbox) {
  for (const step::Send& send : outbox.messages) {
    absl::StatusOr<v1::StepMessage> message = ToWire(send.message);
    if (!message.ok()) {
      spdlog::error("job {}: {}", job_, std::string(message.status().message()));
      continue;
    }
    message->set_job(job_);
    message->set_from(static_cast<uint32_t>(environment_.self));
    environment_.peers->Send(send.to, *std::move(message));
  }
  local_->Deliver();
  for (const auto& [caller, answer] : outbox.answers) caller.done(answer);
}

}  // namespace orlop::server
