// What the shells of both step machines of a job have in common: one lock, under which the
// machine's events run, and the callers that wait for answers.
//
// An event is a call of the machine that appends actions. The shell carries them out in order,
// under the same lock, and none of them waits: what takes time goes to the thread pool and comes
// back as another event. Messages leave after the lock: those to other servers through PeerLinks,
// those to the job's other machine on this server through LocalMessages.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/runtime/environment.h"
#include "server/runtime/job_disk.h"
#include "server/runtime/wait.h"
#include "server/step/actions.h"

namespace orlop::server {

// Messages between the two machines of a job on one server. They are delivered in the order of Add,
// by one thread at a time, which holds no lock of a machine. Threads: any.
class LocalMessages {
 public:
  // `deliver` runs one event of the machine that the message is for, which may add more messages.
  explicit LocalMessages(std::function<void(const step::Message&)> deliver)
      : deliver_(std::move(deliver)) {}

  void Add(step::Message message);  // may be called under a machine's lock
  // Delivers until no message is left. If another thread is in here, returns at once: that thread
  // delivers what was added meanwhile.
  void Deliver();

 private:
  const std::function<void(const step::Message&)> deliver_;
  Mutex mutex_;  // taken last
  std::deque<step::Message> waiting_ GUARDED_BY(mutex_);
  bool is_delivering_ GUARDED_BY(mutex_) = false;
};

class MachineShell {
 public:
  MachineShell(const MachineShell&) = delete;
  MachineShell& operator=(const MachineShell&) = delete;

  // How often the lock was taken: for tests and benchmarks.
  uint64_t lock_count() const { return mutex_.takes(); }

 protected:
  using Event = std::function<void(step::RequestId, int64_t now_ms, step::Actions*)>;

  // The environment outlives the shell. Both shells of a job share `disk` and `local`.
  MachineShell(const Environment& environment, std::string job, std::shared_ptr<JobDisk> disk,
               std::shared_ptr<LocalMessages> local);
  virtual ~MachineShell() = default;

  // Carries out an action of the machine other than Send and Answer.
  virtual void Do(const step::Action& action) REQUIRES(mutex_) = 0;
  // Called when all actions of an event have been carried out.
  virtual void AfterEvent() REQUIRES(mutex_) {}

  // Runs the event of a request, and waits in the caller's thread until the machine has answered
  // it.
  //   Status  the answer's, NotFound (UNKNOWN_JOB) after Close, Cancelled or DeadlineExceeded: the
  //           wait is over; then `on_timeout` withdraws the request.
  absl::StatusOr<step::Answer> Ask(const Wait& wait, const Event& event,
                                   const Event& on_timeout = nullptr);
  // Runs an event that nobody waits for. No effect after Close.
  void Complete(const std::function<void(int64_t now_ms, step::Actions*)>& event);
  // The job was deleted: callers are answered NotFound.
  void CloseCallers() REQUIRES(mutex_);
  // Ends the wait of a caller. No effect if it has gone.
  void AnswerCaller(const step::Answer& answer) REQUIRES(mutex_);
  absl::Status JobGone() const;
  int64_t now_ms() const;  // of the steady clock

  // The machines wait for their epoch and their record without asking again, so the shell tries a
  // write that failed again with the next tick.
  void WriteAgain(step::Action action) REQUIRES(mutex_) { unsynced_.push_back(std::move(action)); }
  step::Actions TakeUnsynced() REQUIRES(mutex_) { return std::exchange(unsynced_, {}); }

  const Environment environment_;
  const std::string job_;
  const std::shared_ptr<JobDisk> disk_;
  const std::shared_ptr<LocalMessages> local_;
  mutable Mutex mutex_;
  mutable CondVar changed_;  // an event is over
  bool closed_ GUARDED_BY(mutex_) = false;

 private:
  struct Caller {
    bool is_answered = false;
    step::Answer answer;
  };

  absl::Status Await(step::RequestId request, const Caller& caller, const Wait& wait,
                     const Event& on_timeout);
  // Carries out actions; returns the messages for other servers.
  std::vector<step::Send> Perform(const step::Actions& actions) REQUIRES(mutex_);
  void Leave(const std::vector<step::Send>& messages) EXCLUDES(mutex_);

  std::map<step::RequestId, std::shared_ptr<Caller>> callers_ GUARDED_BY(mutex_);
  step::RequestId next_request_ GUARDED_BY(mutex_) = 1;
  step::Actions unsynced_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
