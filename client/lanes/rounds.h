// Moves pieces between the caller's memory and their owners: in rounds, every owner at once, over
// several connections each. What a round did not finish is judged (client/link/retry.h) and moved in the
// next, by a fresh placement map if need be.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "client/lanes/pieces.h"
#include "client/link/link.h"
#include "client/link/placement.h"

namespace orlop::client {

// What data calls need of their session. Pointers outlive the calls.
struct DataDoor {
  Link* link = nullptr;
  std::string job;
  const Manifest* manifest = nullptr;
  CancelSet* cancels = nullptr;
  std::function<std::shared_ptr<const Placement>()> placement;
  std::function<absl::Status()> refresh;  // reads the placement map again
};

// Pieces of one server that no connection has taken yet, in order. Threads: any.
class WorkList {
 public:
  void Add(Piece* piece);
  // The next pieces: at least one unless none is left, at most `max_count`, ending once `max_bytes`
  // is reached.
  std::vector<Piece*> Take(size_t max_count, size_t max_bytes);

 private:
  Mutex mutex_;
  std::vector<Piece*> pieces_ GUARDED_BY(mutex_);
  size_t next_ GUARDED_BY(mutex_) = 0;
};

// One connection of a round. (A lane, as in this folder's name, is a transport: gRPC is one.)
struct Connection {
  std::string server;  // name
  std::shared_ptr<grpc::Channel> channel;
  uint64_t epoch = 0;
  Clock::time_point deadline;
};

struct RoundsOptions {
  Rpc rpc = Rpc::kPull;
  Clock::time_point deadline;
  // Takes pieces from the list and moves them until it is empty or something fails; sets
  // Piece::done.
  std::function<absl::Status(const Connection&, WorkList*)> move;
  // Before unfinished pieces of a server are moved again: finds those that are done after all. May
  // be empty.
  std::function<absl::Status(const Connection&, const std::vector<Piece*>&)> find_done;
};

// Returns OK when every piece is done or cancelled. Errors name server, tensor and the number of
// tries.
absl::Status MoveAll(const DataDoor& door, const std::vector<Piece*>& pieces,
                     const RoundsOptions& options);

// `status` with the server and, unless its detail names one, the piece's tensor and shard.
absl::Status AtPiece(const absl::Status& status, const Connection& connection, const Piece& piece);

// When a call of that many bytes must be over.
Clock::time_point DataDeadline(const ClientOptions& options, std::optional<Milliseconds> timeout,
                               uint64_t bytes);

}  // namespace orlop::client
