// Pushes and SetState: queues operations of a session and sends their pieces (client/lanes/rounds.h).
#pragma once

#include <deque>
#include <memory>
#include <thread>

#include "client/lanes/pending_push.h"
#include "client/lanes/rounds.h"

namespace orlop::client {

// What all pieces of one stream have in common.
struct PushKey {
  bool set_state = false;
  int64_t step = 0;
  uint32_t attempt = 0;
  uint64_t generation = 0;
  uint32_t rank = 0;
  double loss_scale = 1;
  friend bool operator==(const PushKey&, const PushKey&) = default;
};

// One thread takes all queued operations of one key together, so that the many small pushes of a
// backward pass share streams. Threads: Start from any. The destructor cancels what is left and
// joins.
class PushEngine {
 public:
  // Called once per operation, before its Wait returns, from the engine's thread.
  using OnDone = std::function<void(const absl::StatusOr<Transfer>&, double seconds)>;

  PushEngine(DataDoor door, OnDone on_done);
  ~PushEngine();

  // Blocks while kMaxQueuedOperations are waiting.
  std::unique_ptr<PendingPush> Start(const PushKey& key, std::vector<Piece> pieces,
                                     std::optional<Milliseconds> timeout);

 private:
  static constexpr size_t kMaxQueuedOperations = 4096;
  class Operation;
  class Handle;

  void Run();
  std::vector<std::shared_ptr<Operation>> TakeAlike();  // empty: stopping
  void Send(const std::vector<std::shared_ptr<Operation>>& operations);

  const DataDoor door_;
  const OnDone on_done_;
  Mutex mutex_;
  CondVar changed_;
  std::deque<std::shared_ptr<Operation>> queue_ GUARDED_BY(mutex_);
  bool stopping_ GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: starts when all else is there
};

// Sends pieces over one stream until the list is empty; returns when no byte of them is referenced
// any more.
absl::Status SendStream(const DataDoor& door, const PushKey& key, const Connection& connection,
                        WorkList* list);
// Marks pieces that the server already has, by region and digest.
absl::Status FindStored(const DataDoor& door, const PushKey& key, const Connection& connection,
                        const std::vector<Piece*>& pieces);

}  // namespace orlop::client
