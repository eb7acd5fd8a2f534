#include "client/lanes/push_queue.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "client/lanes/pending_push.h"
#include "client/lanes/pieces.h"
#include "client/lanes/rounds.h"
#include "client/link/link.h"
#include "client/link/parts.h"
#include "client/link/retry.h"

namespace orlop::client {

// The operation that one Start call queued. The engine's thread moves its pieces; Complete
// publishes the result.
class PushEngine::Operation {
 public:
  Operation(const PushKey& key, std::vector<Piece> pieces, Clock::time_point deadline)
      : key(key), pieces(std::move(pieces)), started(Clock::now()), deadline(deadline) {
    for (Piece& piece : this->pieces) piece.cancelled = &cancelled;
  }

  void Complete(absl::StatusOr<Transfer> result) {
    MutexLock lock(&mutex_);
    result_ = std::move(result);
    changed_.SignalAll();
  }
  absl::StatusOr<Transfer> Wait() {
    MutexLock lock(&mutex_);
    while (!result_) changed_.Wait(&mutex_);
    return *result_;
  }
  bool done() {
    MutexLock lock(&mutex_);
    return result_.has_value();
  }
  // Returns what was transferred if all pieces are stored, else an error.
  absl::StatusOr<Transfer> Outcome(const absl::Status& status) const {
    Transfer transfer{.version = key.step, .pieces = pieces.size()};
    for (const Piece& piece : pieces) {
      if (!piece.done) return status.ok() ? absl::CancelledError("push cancelled") : status;
      transfer.bytes += piece.bytes;
    }
    return transfer;
  }

  const PushKey key;
  // Used by the engine's thread and the threads of its rounds.
  std::vector<Piece> pieces;
  const Clock::time_point started, deadline;
  std::atomic<bool> cancelled{false};

 private:
  Mutex mutex_;
  CondVar changed_;
  std::optional<absl::StatusOr<Transfer>> result_ GUARDED_BY(mutex_);
};

class PushEngine::Handle : public PendingPush {
 public:
  explicit Handle(std::shared_ptr<Operation> operation) : operation_(std::move(operation)) {}
  ~Handle() override { operation_->Wait().status().IgnoreError(); }
  absl::StatusOr<Transfer> Wait() override { return operation_->Wait(); }
  bool done() const override { return operation_->done(); }
  void Cancel() override { operation_->cancelled = true; }

 private:
  const std::shared_ptr<Operation> operation_;
};

PushEngine::PushEngine(DataDoor door, OnDone on_done)
    : door_(std::move(door)), on_done_(std::move(on_done)), thread_([this] { Run(); }) {}

PushEngine::~PushEngine() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    for (const auto& operation : queue_) operation->cancelled = true;
    changed_.SignalAll();
  }
  thread_.join();
}

std::unique_ptr<PendingPush> PushEngine::Start(const PushKey& key, std::vector<Piece> pieces,
                                               std::optional<Milliseconds> timeout) {
  uint64_t bytes = 0;
  for (const Piece& piece : pieces) bytes += piece.bytes;
  auto operation = std::make_shared<Operation>(key, std::move(pieces),
                                               DataDeadline(door_.link->options(), timeout, bytes));
  MutexLock lock(&mutex_);
  while (queue_.size() >= kMaxQueuedOperations) changed_.Wait(&mutex_);
  queue_.push_back(operation);
  changed_.SignalAll();
  return std::make_unique<Handle>(std::move(operation));
}

std::vector<std::shared_ptr<PushEngine::Operation>> PushEngine::TakeAlike() {
  MutexLock lock(&mutex_);
  while (queue_.empty() && !stopping_) changed_.Wait(&mutex_);
  std::vector<std::shared_ptr<Operation>> alike;
  while (!queue_.empty() && (alike.empty() || queue_.front()->key == alike[0]->key)) {
    alike.push_back(std::move(queue_.front()));
    queue_.pop_front();
  }
  changed_.SignalAll();  // wakes the callers that wait in Start for room
  return alike;
}

void PushEngine::Send(const std::vector<std::shared_ptr<Operation>>& operations) {
  std::vector<Piece*> pieces;
  RoundsOptions rounds{.rpc = Rpc::kPush, .deadline = operations[0]->deadline};
  for (const auto& operation : operations) {
    rounds.deadline = std::max(rounds.deadline, operation->deadline);
    for (Piece& piece : operation->pieces) pieces.push_back(&piece);
  }
  const PushKey& key = operations[0]->key;
  rounds.move = [&](const Connection& connection, WorkList* list) {
    return SendStream(door_, key, connection, list);
  };
  rounds.find_done = [&](const Connection& connection, const std::vector<Piece*>& left) {
    return FindStored(door_, key, connection, left);
  };
  const absl::Status status = MoveAll(door_, pieces, rounds);
  for (const auto& operation : operations) {
    absl::StatusOr<Transfer> outcome = operation->Outcome(status);
    on_done_(outcome, std::chrono::duration<double>(Clock::now() - operation->started).count());
    operation->Complete(std::move(outcome));
  }
}

void PushEngine::Run() {
  while (true) {
    const auto operations = TakeAlike();
    if (operations.empty()) return;
    Send(operations);
  }
}

}  // namespace orlop::client
