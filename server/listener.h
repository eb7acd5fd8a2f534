// Accepts the connections of a door. Every connection is counted, known by its user where it comes
// from this host, and closed if it is one too many.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "server/socket_path.h"

namespace orlop::server {

class Listener {
 public:
  // Whose a new connection is, how many of that kind may be open at a time, and a lane, by which it
  // may be cut off.
  struct Admission {
    int kind = 0;
    int most = 0;
    int lane = 0;
    uint64_t source = 0;  // who is held back when one of the same source was cut off
  };
  struct Options {
    std::string address;         // host:port (port 0: the system chooses) or unix:/path
    int most_connections = 0;    // of all kinds
    bool is_for_others = false;  // a Unix socket that other users may open too
    // Says whose a new connection is. An error closes it, and is logged.
    std::function<absl::StatusOr<Admission>(int fd)> admit;
    // Takes a connection over, and closes it in the end. It must call shutdown(2) before it does.
    std::function<void(int lane, int listener_fd, int fd)> take;
  };

  // Binds the address and listens; accepts nothing yet.
  //   Status  Unavailable: the address is in use, or cannot be bound. InvalidArgument: the host is
  //           unknown. As SocketPath::Take.
  static absl::StatusOr<std::unique_ptr<Listener>> Open(Options options);
  // As Close.
  ~Listener();

  // Returns the address with the actual port, or unix:/path.
  const std::string& address() const { return address_; }
  void Start();
  // Closes the connections of a lane, and throws away what they have sent. Further ones of the same
  // source are taken over one at a time, from when gRPC has freed what the closed ones held.
  //   Threads  any
  void Cut(int lane);
  // Stops listening. Connections that were taken over stay open. Idempotent.
  void Close();

 private:
  explicit Listener(Options options) : options_(std::move(options)) {}

  absl::Status Bind();
  absl::Status BindUnix(const std::string& path);
  absl::Status BindHost();
  void Run();
  void Accept(int listener_fd);
  absl::Status Take(int listener_fd, int fd);
  void HandOver();
  bool MayGo(uint64_t source, bool is_time) REQUIRES(mutex_);
  void Refuse(const absl::Status& why);
  bool IsHeld(int fd);
  void Ended(int fd);

  const Options options_;
  std::string address_;
  SocketPath path_;  // if the address is a Unix socket
  std::vector<int> listening_;
  int events_ = -1, stop_ = -1;  // an epoll, and an eventfd that ends the thread
  std::thread thread_;
  struct Connection {
    Admission admission;
    int fd;        // the descriptor that gRPC is given, and closes when all its calls are freed
    ino_t socket;  // by which it is known from a later one of the same number
    int listener_fd;
    int64_t since_ms;
    bool is_held;
  };
  mutable Mutex mutex_;
  // By a second descriptor of each connection, by which its end is seen.
  std::map<int, Connection> connections_ GUARDED_BY(mutex_);
  struct Cutting {
    uint64_t source;
    int fd;
    ino_t socket;
    int64_t since_ms;
  };
  std::vector<Cutting> cut_ GUARDED_BY(mutex_);  // and perhaps not freed yet
  // Of the thread.
  std::map<int, int> counts_;  // of open connections, by kind
  int open_ = 0;
  std::deque<int> held_;  // connections that gRPC is not given yet, by their second descriptor
  std::set<uint64_t> waiting_;  // sources of those that wait until what was cut off is freed
  int64_t passed_ms_ = 0;
  int64_t refused_ = 0, told_ms_ = -1'000'000;
};

}  // namespace orlop::server
