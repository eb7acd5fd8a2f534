// Moves pieces between the caller's memory and their owners. A round uses every owner at once, over
// several connections each. If a round fails, client/link/retry.h decides whether the unfinished
// pieces are moved in another round, and whether the placement map is read again before it.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "client/lanes/pieces.h"
#include "client/link/link.h"
#include "client/link/placement.h"

namespace orlop::client {

// What a data call uses of its session. The pointers must outlive the call.
struct DataDoor {
  Link* link = nullptr;
  std::string job;
  const Manifest* manifest = nullptr;
  CancelSet* cancels = nullptr;
  std::function<std::shared_ptr<const Placement>()> placement;
  // Reads the placement map again.
  std::function<absl::Status()> refresh;
};

// The pieces of one server that no connection has taken yet, in order. Threads: any.
class WorkList {
 public:
  void Add(Piece* piece);
  // Takes the next pieces: at most `max_count`, and none after their bytes reach `max_bytes`. Empty
  // only if no piece is left.
  std::vector<Piece*> Take(size_t max_count, size_t max_bytes);

 private:
  Mutex mutex_;
  std::vector<Piece*> pieces_ GUARDED_BY(mutex_);
  size_t next_ GUARDED_BY(mutex_) = 0;
};

// One connection of a round. (A lane, as in this folder's name, is a transport: gRPC is one.)
struct Connection {
  // Name of the server.
  std::string server;
  std::shared_ptr<grpc::Channel> channel;
  uint64_t epoch = 0;
  Clock::time_point deadline;
};

struct RoundsOptions {
  Rpc rpc = Rpc::kPull;
  Clock::time_point deadline;
  // Takes pieces from the list and moves them until the list is empty or an error occurs. Sets
  // Piece::done.
  std::function<absl::Status(const Connection&, WorkList*)> move;
  // Called before a server's unfinished pieces are moved again. Sets Piece::done on pieces that had
  // arrived after all. May be empty.
  std::function<absl::Status(const Connection&, const std::vector<Piece*>&)> find_done;
};

// Returns OK when every piece is done or cancelled. Errors name server, tensor and the number of
// tries.
absl::Status MoveAll(const DataDoor& door, const std::vector<Piece*>& pieces,
                     const RoundsOptions& options);

// Adds to `status` the server and, unless its detail names a tensor, the piece's tensor and shard.
absl::Status AtPiece(const absl::Status& status, const Connection& connection, const Piece& piece);

// Returns the deadline of a call that moves `bytes`: `timeout` from now, or if absent
// options.data_timeout + bytes / options.slowest_bytes_per_second.
Clock::time_point DataDeadline(const ClientOptions& options, std::optional<Milliseconds> timeout,
                               uint64_t bytes);

}  // namespace orlop::client
