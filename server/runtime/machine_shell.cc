#include "server/runtime/machine_shell.h"

#include <algorithm>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "proto/status.h"
#include "server/job/step_codec.h"
#include "spdlog/spdlog.h"

namespace orlop::server {

using std::chrono::steady_clock;

void LocalMessages::Add(step::Message message) {
  MutexLock lock(&mutex_);
  waiting_.push_back(std::move(message));
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
  }
}

MachineShell::MachineShell(const Environment& environment, std::string job,
                           std::shared_ptr<JobDisk> disk, std::shared_ptr<LocalMessages> local)
    : environment_(environment),
      job_(std::move(job)),
      disk_(std::move(disk)),
      local_(std::move(local)) {}

int64_t MachineShell::now_ms() const {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             steady_clock::now().time_since_epoch())
      .count();
}

absl::Status MachineShell::JobGone() const {
  return MakeError(absl::StatusCode::kNotFound, absl::StrCat("job '", job_, "' was deleted"),
                   v1::ErrorDetail::UNKNOWN_JOB);
}

absl::StatusOr<step::Answer> MachineShell::Ask(const Wait& wait, const Event& event,
                                               const Event& on_timeout) {
  const auto caller = std::make_shared<Caller>();
  step::RequestId request = 0;
  std::vector<step::Send> messages;
  bool is_answered = false;
  {
    MutexLock lock(&mutex_);
    if (closed_) return JobGone();
    request = next_request_++;
    callers_[request] = caller;
    step::Actions actions;
    event(request, now_ms(), &actions);
    messages = Perform(actions);
    is_answered = caller->is_answered;
    if (is_answered) callers_.erase(request);
  }
  Leave(messages);
  if (!is_answered)
    if (absl::Status status = Await(request, *caller, wait, on_timeout); !status.ok())
      return status;
  if (!caller->answer.status.ok()) return caller->answer.status;
  return caller->answer;
}

// Waits until the request is answered, and withdraws it if it is not.
absl::Status MachineShell::Await(step::RequestId request, const Caller& caller, const Wait& wait,
                                 const Event& on_timeout) {
  std::vector<step::Send> messages;
  {
    MutexLock lock(&mutex_);
    while (!caller.is_answered && !wait.is_over())
      changed_.WaitUntil(&mutex_, std::min(wait.deadline, steady_clock::now() + kCancelPoll));
    callers_.erase(request);
    if (caller.is_answered) return absl::OkStatus();
    step::Actions late;
    if (on_timeout) on_timeout(request, now_ms(), &late);
    messages = Perform(late);
  }
  Leave(messages);
  if (steady_clock::now() < wait.deadline) return absl::CancelledError("the caller went away");
  const absl::Status disk = disk_->status();
  return absl::DeadlineExceededError(
      absl::StrCat("job '", job_, "': the deadline passed while waiting",
                   disk.ok() ? "" : " for the disk: ", disk.message()));
}

void MachineShell::Complete(const std::function<void(int64_t, step::Actions*)>& event) {
  std::vector<step::Send> messages;
  {
    MutexLock lock(&mutex_);
    if (closed_) return;
    step::Actions actions;
    event(now_ms(), &actions);
    messages = Perform(actions);
  }
  Leave(messages);
}

std::vector<step::Send> MachineShell::Perform(const step::Actions& actions) {
  std::vector<step::Send> messages;
  for (const step::Action& action : actions) {
    if (const auto* send = std::get_if<step::Send>(&action)) {
      if (send->to == environment_.self) {
        local_->Add(send->message);
      } else {
        messages.push_back(*send);
      }
    } else if (const auto* answer = std::get_if<step::Answer>(&action)) {
      AnswerCaller(*answer);
    } else {
      Do(action);
    }
  }
  AfterEvent();
  changed_.SignalAll();
  return messages;
}

void MachineShell::AnswerCaller(const step::Answer& answer) {
  const auto it = callers_.find(answer.request);
  if (it == callers_.end()) return;
  it->second->answer = answer;
  it->second->is_answered = true;
}

void MachineShell::Leave(const std::vector<step::Send>& messages) {
  for (const step::Send& send : messages) {
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
}

void MachineShell::CloseCallers() {
  closed_ = true;
  for (auto& [request, caller] : callers_) {
    caller->is_answered = true;
    caller->answer.status = JobGone();
  }
  changed_.SignalAll();
}

}  // namespace orlop::server
