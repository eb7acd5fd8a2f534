#include "client/lanes/rounds.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "client/lanes/pieces.h"
#include "client/link/link.h"
#include "client/link/parts.h"
#include "client/link/placement.h"
#include "client/link/retry.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"

namespace orlop::client {
namespace {

bool Unfinished(const Piece& piece) {
  return !piece.done && !(piece.cancelled != nullptr && *piece.cancelled);
}

using ByServer = std::map<uint32_t, std::vector<Piece*>>;

ByServer Route(const std::vector<Piece*>& pieces, const Placement& placement) {
  ByServer routes;
  for (Piece* piece : pieces)
    if (Unfinished(*piece))
      routes[placement.OwnerOf(piece->tensor, piece->region.shard())].push_back(piece);
  return routes;
}

Connection ConnectionTo(const DataDoor& door, const Placement& placement, uint32_t server,
                        int number, Clock::time_point deadline) {
  const v1::ServerInfo& info = placement.server(server);
  return {info.name(), door.link->ChannelTo(info.address(), number), placement.epoch(), deadline};
}

// Keeps the failure that a round reports: one that must not be retried before one that may be.
class WorstFailure {
 public:
  explicit WorstFailure(Rpc rpc) : rpc_(rpc) {}
  void Add(const absl::Status& status) {
    MutexLock lock(&mutex_);
    if (!status.ok() && (status_.ok() || Judge(rpc_, status) == Verdict::kGiveUp)) status_ = status;
  }
  absl::Status status() {
    MutexLock lock(&mutex_);
    return status_;
  }

 private:
  const Rpc rpc_;
  Mutex mutex_;
  absl::Status status_ GUARDED_BY(mutex_);
};

absl::Status OneRound(const DataDoor& door, const ByServer& routes, const Placement& placement,
                      const RoundsOptions& options, bool repeat) {
  WorstFailure failure(options.rpc);
  std::vector<std::unique_ptr<WorkList>> lists;
  std::vector<std::thread> threads;
  for (const auto& [server, pieces] : routes) {
    if (repeat && options.find_done) {
      const absl::Status found =
          options.find_done(ConnectionTo(door, placement, server, 0, options.deadline), pieces);
      if (!found.ok()) {
        failure.Add(found);
        continue;
      }
    }
    WorkList* list = lists.emplace_back(std::make_unique<WorkList>()).get();
    int count = 0;
    for (Piece* piece : pieces)
      if (Unfinished(*piece)) list->Add(piece), ++count;
    const int connections = std::min(count, door.link->options().connections_per_server);
    for (int number = 0; number < connections; ++number)
      threads.emplace_back([&options, &failure, list,
                            to = ConnectionTo(door, placement, server, number, options.deadline)] {
        failure.Add(options.move(to, list));
      });
  }
  for (std::thread& thread : threads) thread.join();
  return failure.status();
}

}  // namespace

void WorkList::Add(Piece* piece) {
  MutexLock lock(&mutex_);
  pieces_.push_back(piece);
}

std::vector<Piece*> WorkList::Take(size_t max_count, size_t max_bytes) {
  MutexLock lock(&mutex_);
  std::vector<Piece*> taken;
  for (size_t bytes = 0; next_ < pieces_.size() && taken.size() < max_count && bytes < max_bytes;
       ++next_) {
    if (!Unfinished(*pieces_[next_])) continue;
    taken.push_back(pieces_[next_]);
    bytes += pieces_[next_]->bytes;
  }
  return taken;
}

absl::Status AtPiece(const absl::Status& status, const Connection& connection, const Piece& piece) {
  v1::ErrorDetail where = DetailOf(status);
  if (where.server().empty()) where.set_server(connection.server);
  if (where.tensor().empty()) {
    where.set_tensor(piece.region.tensor());
    where.set_shard(piece.region.shard());
  }
  const std::string shard = where.has_shard() ? absl::StrCat(" shard ", where.shard()) : "";
  return Annotated(status,
                   absl::StrCat("server ", connection.server, ", tensor ", where.tensor(), shard),
                   where);
}

Clock::time_point DataDeadline(const ClientOptions& options, std::optional<Milliseconds> timeout,
                               uint64_t bytes) {
  const Milliseconds scaled(
      static_cast<int64_t>(1000.0 * static_cast<double>(bytes) / options.slowest_bytes_per_second));
  return Clock::now() + timeout.value_or(options.data_timeout + scaled);
}

absl::Status MoveAll(const DataDoor& door, const std::vector<Piece*>& pieces,
                     const RoundsOptions& options) {
  for (int number = 0;; ++number) {
    const std::shared_ptr<const Placement> placement = door.placement();
    const ByServer routes = Route(pieces, *placement);
    if (routes.empty()) return absl::OkStatus();
    const absl::Status status = OneRound(door, routes, *placement, options, number > 0);
    // Every piece is done, or some were cancelled meanwhile: the next Route() finds out. One call
    // of a round may have been refused when those beside it moved everything.
    if (status.ok() || Route(pieces, *door.placement()).empty()) continue;
    const Verdict verdict = Judge(options.rpc, status);
    if (!door.link->PrepareRetry(verdict, number, options.deadline, door.cancels))
      return Annotated(
          status, absl::StrCat("given up after ", number + 1, number == 0 ? " try" : " tries"));
    if (verdict == Verdict::kRefresh)
      if (absl::Status refreshed = door.refresh(); !refreshed.ok()) return refreshed;
  }
}

}  // namespace orlop::client
