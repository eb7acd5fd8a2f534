// What the shells of both step machines of a job have in common: one lock, under which the
// machine's events run, and the callers that wait for answers. A caller that waits holds no thread
// of its own unless it wants to (Await).
//
// An event is a call of the machine that appends actions. The shell carries them out in order,
// under the same lock, and none of them waits: what takes time goes to the thread pool and comes
// back as another event. Messages leave after the lock: those to other servers through PeerLinks,
// those to the job's other machine on this server through LocalMessages.
#pragma once

#include <chrono>
#include <cstdint>
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
  // Waits until all messages that were added before this call have been delivered. The caller holds
  // no lock.
  void AwaitDelivery();

 private:
  const std::function<void(const step::Message&)> deliver_;
  Mutex mutex_;  // taken last
  std::deque<step::Message> waiting_ GUARDED_BY(mutex_);
  bool is_delivering_ GUARDED_BY(mutex_) = false;
  uint64_t added_ GUARDED_BY(mutex_) = 0;
  uint64_t delivered_ GUARDED_BY(mutex_) = 0;
  CondVar has_delivered_;
};

// Who waits for the answer to a request.
struct Caller {
  // Called exactly once, without a lock of the job: with the answer, if its status is OK, or with
  // an error. It must not block.
  std::function<void(absl::StatusOr<step::Answer>)> done;
  // The request is withdrawn with the first tick after this, and `done` gets DeadlineExceeded.
  std::chrono::steady_clock::time_point deadline = std::chrono::steady_clock::time_point::max();
};

class MachineShell {
 public:
  MachineShell(const MachineShell&) = delete;
  MachineShell& operator=(const MachineShell&) = delete;

  // Ends the wait for a request that has no answer yet: its caller gets `why`. Otherwise no effect.
  void Withdraw(step::RequestId request, const absl::Status& why);
  // Waits in this thread for the answer to the request that `ask` begins with the caller it is
  // given; withdraws the request when the wait is over.
  //   Status  the answer's, NotFound (UNKNOWN_JOB) after Close, Cancelled or DeadlineExceeded.
  absl::StatusOr<step::Answer> Await(const Wait& wait,
                                     const std::function<step::RequestId(Caller)>& ask);

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

  // Runs the event of a request, and returns its id; the caller is called in here if the answer is
  // there at once. `on_withdraw` tells the machine that nobody waits any more.
  step::RequestId Ask(Caller caller, const Event& event, Event on_withdraw = nullptr);
  // Runs an event that nobody waits for. No effect after Close.
  void Complete(const std::function<void(int64_t now_ms, step::Actions*)>& event);
  // Answers a request; no effect if it was withdrawn.
  void AnswerCaller(const step::Answer& answer) REQUIRES(mutex_);
  // Withdraws the requests whose deadline has passed.
  void ExpireCallers();
  // The job was deleted: callers are answered NotFound, now and later, and completions ignored.
  void CloseCallers();
  absl::Status JobGone() const;
  absl::Status BeingConfigured() const;  // Unavailable

  // The machines wait for their epoch and their record without asking again, so the shell tries a
  // write that failed again with the next tick.
  void WriteAgain(step::Action action) REQUIRES(mutex_) { unsynced_.push_back(std::move(action)); }
  step::Actions TakeUnsynced() REQUIRES(mutex_) { return std::exchange(unsynced_, {}); }

  static int64_t now_ms();  // of the steady clock

  const Environment environment_;
  const std::string job_;
  const std::shared_ptr<JobDisk> disk_;
  const std::shared_ptr<LocalMessages> local_;
  mutable Mutex mutex_;
  bool closed_ GUARDED_BY(mutex_) = false;

 private:
  struct Request {
    Caller caller;
    Event on_withdraw;
  };
  // What leaves after an event, without the lock.
  struct Outbox {
    std::vector<step::Send> messages;  // to other servers
    std::vector<std::pair<Caller, absl::StatusOr<step::Answer>>> answers;
  };

  Outbox Perform(const step::Actions& actions) REQUIRES(mutex_);
  void Leave(const Outbox& outbox);
  absl::Status DeadlinePassed() const;

  std::map<step::RequestId, Request> requests_ GUARDED_BY(mutex_);  // without an answer
  Outbox outbox_ GUARDED_BY(mutex_);                                // of the event under way
  step::RequestId next_request_ GUARDED_BY(mutex_) = 1;
  step::Actions unsynced_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
