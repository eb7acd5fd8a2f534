#include "server/listener.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "server/socket_path.h"
#include "spdlog/spdlog.h"

namespace orlop::server {
namespace {

constexpr int kBacklog = 4096;   // the system takes less if it is set up so
constexpr int kTellMs = 10'000;  // a line about refused connections at most this often
constexpr int kAcceptsAtOnce = 64;
constexpr int kNoDescriptorMs = 100;         // wait after the process has run out of descriptors
constexpr unsigned kUserTimeoutMs = 20'000;  // unacknowledged bytes end a TCP connection
constexpr int kPaceMs = 20;       // between connections of a source of which one was cut off
constexpr int kFreedMs = 10'000;  // what was cut off is taken to be freed after this time
constexpr int kHeldMs = 15'000;   // a connection that waits for so long is closed
constexpr int kBindTries = 10;    // of a port that the system has chosen for another family

int64_t NowMs() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

absl::Status CannotBind(int error) {
  return absl::UnavailableError(absl::StrCat("cannot be bound: ", std::strerror(error)));
}

int PortOf(int fd) {
  sockaddr_storage bound = {};
  socklen_t size = sizeof(bound);
  getsockname(fd, reinterpret_cast<sockaddr*>(&bound), &size);
  return ntohs(bound.ss_family == AF_INET ? reinterpret_cast<sockaddr_in&>(bound).sin_port
                                          : reinterpret_cast<sockaddr_in6&>(bound).sin6_port);
}

// Returns a socket that listens at one address of a host; -1 with errno.
int ListenAt(const addrinfo& at, int port) {
  sockaddr_storage address = {};
  std::memcpy(&address, at.ai_addr, at.ai_addrlen);
  if (at.ai_family == AF_INET)
    reinterpret_cast<sockaddr_in&>(address).sin_port = htons(static_cast<uint16_t>(port));
  else
    reinterpret_cast<sockaddr_in6&>(address).sin6_port = htons(static_cast<uint16_t>(port));
  const int fd = socket(at.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  const int yes = 1;
  // Every IPv4 address is its own, but [::] is all addresses of both families.
  const int only = at.ai_family == AF_INET6 &&
                   !IN6_IS_ADDR_UNSPECIFIED(&reinterpret_cast<sockaddr_in6&>(address).sin6_addr);
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  // Accepted sockets inherit these.
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
  setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &kUserTimeoutMs, sizeof(kUserTimeoutMs));
  if (at.ai_family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &only, sizeof(only));
  if (bind(fd, reinterpret_cast<sockaddr*>(&address), at.ai_addrlen) == 0 &&
      listen(fd, kBacklog) == 0)
    return fd;
  const int error = errno;
  close(fd);
  errno = error;
  return -1;
}

// Returns the inode of a descriptor's socket; 0 if there is none.
ino_t SocketOf(int fd) {
  struct stat found = {};
  return fstat(fd, &found) == 0 ? found.st_ino : 0;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Listener>> Listener::Open(Options options) {
  std::unique_ptr<Listener> listener(new Listener(std::move(options)));
  if (absl::Status bound = listener->Bind(); !bound.ok()) return bound;
  listener->events_ = epoll_create1(EPOLL_CLOEXEC);
  listener->stop_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (listener->events_ < 0 || listener->stop_ < 0)
    return absl::ErrnoToStatus(errno, "no descriptor is left");
  return listener;
}

absl::Status Listener::Bind() {
  if (absl::StartsWith(options_.address, "unix:")) {
    address_ = options_.address;
    return BindUnix(options_.address.substr(5));
  }
  const size_t colon = options_.address.rfind(':');
  const bool any_port = options_.address.substr(colon + 1) == "0";
  absl::Status bound = BindHost();
  for (int tries = 1; any_port && !bound.ok() && tries < kBindTries; ++tries) bound = BindHost();
  if (bound.ok())
    address_ = absl::StrCat(options_.address.substr(0, colon), ":", PortOf(listening_[0]));
  return bound;
}

absl::Status Listener::BindUnix(const std::string& path) {
  absl::StatusOr<SocketPath> taken = SocketPath::Take(path);
  if (!taken.ok()) return taken.status();
  path_ = *std::move(taken);
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return CannotBind(errno);
  listening_.push_back(fd);
  sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = {}};
  std::memcpy(address.sun_path, path.data(), path.size());  // SocketPath knows that it fits
  if (bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0)
    return CannotBind(errno);
  const mode_t mode = options_.is_for_others ? 0666 : 0600;
  if (chmod(path.c_str(), mode) != 0 || listen(fd, kBacklog) != 0) return CannotBind(errno);
  return absl::OkStatus();
}

// Binds every address of the host, or none.
absl::Status Listener::BindHost() {
  const size_t colon = options_.address.rfind(':');
  std::string host = options_.address.substr(0, colon);
  if (host.size() > 2 && host.front() == '[') host = host.substr(1, host.size() - 2);
  const addrinfo hints = {.ai_flags = AI_PASSIVE | AI_NUMERICSERV,
                          .ai_family = AF_UNSPEC,
                          .ai_socktype = SOCK_STREAM,
                          .ai_protocol = 0,
                          .ai_addrlen = 0,
                          .ai_addr = nullptr,
                          .ai_canonname = nullptr,
                          .ai_next = nullptr};
  addrinfo* found = nullptr;
  const std::string service = options_.address.substr(colon + 1);
  if (const int error = getaddrinfo(host.c_str(), service.c_str(), &hints, &found); error != 0)
    return absl::InvalidArgumentError(
        absl::StrCat("host '", host, "' is unknown: ", gai_strerror(error)));
  int port = 0, failed = 0, absent = 0;
  absl::SimpleAtoi(service, &port);
  for (const addrinfo* at = found; at != nullptr && failed == 0; at = at->ai_next) {
    const int fd = ListenAt(*at, port);
    if (fd >= 0) {
      listening_.push_back(fd);
      port = PortOf(fd);
    } else {
      // The name of a host may have an address of IPv6 where there is none.
      (errno == EADDRNOTAVAIL || errno == EAFNOSUPPORT ? absent : failed) = errno;
    }
  }
  freeaddrinfo(found);
  if (failed == 0 && listening_.empty()) failed = absent;
  if (failed == 0) return absl::OkStatus();
  for (const int fd : std::exchange(listening_, {})) close(fd);
  return CannotBind(failed);
}

void Listener::Start() {
  for (const int fd : listening_) {
    epoll_event event = {.events = EPOLLIN, .data = {.fd = fd}};
    epoll_ctl(events_, EPOLL_CTL_ADD, fd, &event);
  }
  epoll_event event = {.events = EPOLLIN, .data = {.fd = stop_}};
  epoll_ctl(events_, EPOLL_CTL_ADD, stop_, &event);
  thread_ = std::thread([this] { Run(); });
}

void Listener::Close() {
  if (thread_.joinable()) {
    const uint64_t one = 1;
    // An eventfd takes this at once.
    if (write(stop_, &one, sizeof(one)) != sizeof(one)) std::abort();
    thread_.join();
  }
  const bool had_path = !listening_.empty() && absl::StartsWith(address_, "unix:");
  for (const int fd : std::exchange(listening_, {})) close(fd);
  for (const int fd : std::exchange(held_, {})) Ended(fd);
  if (had_path) unlink(address_.c_str() + 5);
  path_ = SocketPath();
}

Listener::~Listener() {
  Close();
  MutexLock lock(&mutex_);
  for (const auto& [fd, connection] : connections_) close(fd);
  for (const int fd : {events_, stop_})
    if (fd >= 0) close(fd);
}

void Listener::Run() {
  epoll_event found[64];
  while (true) {
    const int count = epoll_wait(events_, found, 64, held_.empty() ? -1 : kPaceMs);
    for (int i = 0; i < count; ++i) {
      const int fd = found[i].data.fd;
      if (fd == stop_) return;
      if (std::find(listening_.begin(), listening_.end(), fd) != listening_.end())
        Accept(fd);
      else if ((found[i].events & EPOLLHUP) != 0 || IsHeld(fd))
        Ended(fd);
    }
    HandOver();
  }
}

// Accepts what waits at a listening socket, but not much at once, so that ends are seen meanwhile.
void Listener::Accept(int listener_fd) {
  for (int i = 0; i < kAcceptsAtOnce; ++i) {
    const int fd = accept4(listener_fd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) {
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
        Refuse(absl::ErrnoToStatus(errno, "no descriptor"));
        std::this_thread::sleep_for(std::chrono::milliseconds(kNoDescriptorMs));
      }
      return;
    }
    if (absl::Status taken = Take(listener_fd, fd); !taken.ok()) {
      close(fd);
      Refuse(taken);
    }
  }
}

// Counts a connection and hands it over; an error leaves it to the caller.
absl::Status Listener::Take(int listener_fd, int fd) {
  if (open_ >= options_.most_connections)
    return absl::ResourceExhaustedError(
        absl::StrCat("the limit is ", options_.most_connections, " connections at a time"));
  const absl::StatusOr<Admission> admission = options_.admit(fd);
  if (!admission.ok()) return admission.status();
  int& count = counts_[admission->kind];
  if (count >= admission->most)
    return absl::ResourceExhaustedError(
        absl::StrCat("the limit is ", admission->most, " connections of such a user at a time"));
  const int watched = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (watched < 0) return absl::ErrnoToStatus(errno, "no descriptor");
  // gRPC shuts a connection down before it closes its descriptor, which is told however few events
  // are asked for. One that is held may be ended by its client alone.
  epoll_event event = {.events = EPOLLET | EPOLLRDHUP, .data = {.fd = watched}};
  epoll_ctl(events_, EPOLL_CTL_ADD, watched, &event);
  {
    MutexLock lock(&mutex_);
    connections_.emplace(
        watched, Connection{*admission, fd, SocketOf(fd), listener_fd, NowMs(), /*is_held=*/true});
  }
  ++count;
  ++open_;
  held_.push_back(watched);
  return absl::OkStatus();
}

// Gives connections to gRPC: all at once, but of a source of which one was cut off one at a time
// and when that one is freed. Each may bring as many calls as the one before, and take as long.
void Listener::HandOver() {
  const int64_t now = NowMs();
  const bool is_time = now - passed_ms_ >= kPaceMs;
  if (is_time) passed_ms_ = now;
  std::set<uint64_t> waiting, gone;
  std::vector<int> late;
  for (const int watched : std::exchange(held_, {})) {
    Connection connection;
    {
      MutexLock lock(&mutex_);
      Connection& held = connections_.at(watched);
      const uint64_t source = held.admission.source;
      held.is_held = waiting.contains(source) || gone.contains(source) || !MayGo(source, is_time);
      connection = held;
    }
    if (connection.is_held) {
      waiting.insert(connection.admission.source);
      held_.push_back(watched);
      if (now - connection.since_ms > kHeldMs) late.push_back(watched);
      continue;
    }
    if (waiting_.contains(connection.admission.source)) gone.insert(connection.admission.source);
    options_.take(connection.admission.lane, connection.listener_fd, connection.fd);
  }
  waiting_ = std::move(waiting);
  for (const int watched : late) {
    Refuse(absl::ResourceExhaustedError("others of the same client were cut off"));
    Ended(watched);
  }
}

// Whether the next connection of a source may go to gRPC.
bool Listener::MayGo(uint64_t source, bool is_time) {
  std::erase_if(cut_, [](const Cutting& cut) {
    return SocketOf(cut.fd) != cut.socket || NowMs() - cut.since_ms > kFreedMs;
  });
  if (waiting_.contains(source) && !is_time) return false;
  return std::none_of(cut_.begin(), cut_.end(),
                      [source](const Cutting& cut) { return cut.source == source; });
}

bool Listener::IsHeld(int fd) {
  MutexLock lock(&mutex_);
  const auto found = connections_.find(fd);
  return found != connections_.end() && found->second.is_held;
}

// A connection whose second descriptor is `fd` has ended.
void Listener::Ended(int fd) {
  MutexLock lock(&mutex_);
  const auto found = connections_.find(fd);
  if (found == connections_.end()) return;
  if (found->second.is_held) {
    std::erase(held_, fd);  // its number may soon be that of another one
    close(found->second.fd);
  }
  --counts_[found->second.admission.kind];
  --open_;
  connections_.erase(found);
  // gRPC may still hold its own descriptor, so that closing this one would not do.
  epoll_ctl(events_, EPOLL_CTL_DEL, fd, nullptr);
  close(fd);
}

void Listener::Cut(int lane) {
  MutexLock lock(&mutex_);
  for (const auto& [fd, connection] : connections_) {
    if (connection.admission.lane != lane || connection.is_held) continue;
    cut_.push_back({connection.admission.source, connection.fd, connection.socket, NowMs()});
    shutdown(fd, SHUT_RDWR);
    // gRPC would read the rest, which may be megabytes.
    char waste[1 << 14];
    while (recv(fd, waste, sizeof(waste), MSG_DONTWAIT) > 0) {
    }
    spdlog::warn("{} has cut off a client that made more calls than fit", address_);
  }
}

// Logs that a connection was closed, and how many were since the line before.
void Listener::Refuse(const absl::Status& why) {
  ++refused_;
  if (NowMs() - told_ms_ < kTellMs) return;
  told_ms_ = NowMs();
  spdlog::warn("{} closes new connections ({} so far): {}", address_, refused_,
               std::string(why.message()));
}

}  // namespace orlop::server
