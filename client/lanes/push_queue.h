// Queues the Push and SetState operations of a session and sends their pieces in rounds
// (client/lanes/rounds.h).
#pragma once

#include <deque>
#include <memory>
#include <thread>

#include "client/lanes/pending_push.h"
#include "client/lanes/rounds.h"

namespace orlop::client {

// The fields that all pieces of one stream share.
struct PushKey {
  bool set_state = false;
  int64_t step = 0;
  uint32_t attempt = 0;
  uint64_t generation = 0;
  uint32_t rank = 0;
  double loss_scale = 1;
  friend bool operator==(const PushKey&, const PushKey&) = default;
};

// One thread takes all queued operations with the same key together, so that the many small pushes
// of a backward pass share streams. Threads: any thread may call Start. The destructor cancels the
// queued operations and joins the thread.
class PushEngine {
 public:
  // The engine's thread calls this once per operation, before the operation's Wait returns.
  using OnDone = std::function<void(const absl::StatusOr<Transfer>&, double seconds)>;

  PushEngine(DataDoor door, OnDone on_done);
  ~PushEngine();

  // Queues an operation. Blocks while kMaxQueuedOperations are waiting.
  std::unique_ptr<PendingPush> Start(const PushKey& key, std::vector<Piece> pieces,
                                     std::optional<Milliseconds> timeout);

 private:
  static constexpr size_t kMaxQueuedOperations = 4096;
  class Operation;
  class Handle;

  void Run();
  // Waits for an operation, then takes it and those after it with the same key. Empty: stopping.
  std::vector<std::shared_ptr<Operation>> TakeAlike();
  void Send(const std::vector<std::shared_ptr<Operation>>& operations);

  const DataDoor door_;
  const OnDone on_done_;
  Mutex mutex_;
  CondVar changed_;
  std::deque<std::shared_ptr<Operation>> queue_ GUARDED_BY(mutex_);
  bool stopping_ GUARDED_BY(mutex_) = false;
  // Declared last, because it uses all other members.
  std::thread thread_;
};

// Sends the list's pieces over one stream until the list is empty. Returns when gRPC references
// none of their bytes any more.
absl::Status SendStream(const DataDoor& door, const PushKey& key, const Connection& connection,
                        WorkList* list);
// Sets `done` on pieces that the server has already stored with the same region and digest.
absl::Status FindStored(const DataDoor& door, const PushKey& key, const Connection& connection,
                        const std::vector<Piece*>& pieces);

}  // namespace orlop::client
