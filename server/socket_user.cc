#include "server/socket_user.h"

#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pwd.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace orlop::server {
namespace {

// The two ends of a TCP connection as its client sees them. Addresses and ports are in network
// order; an IPv4 address has one word.
struct Ends {
  int family = 0;
  uint32_t client[4] = {}, server[4] = {};
  uint16_t client_port = 0, server_port = 0;
};

void ReadEnd(const sockaddr_storage& from, uint32_t (&address)[4], uint16_t* port) {
  if (from.ss_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(from);
    address[0] = v4.sin_addr.s_addr;
    *port = v4.sin_port;
  } else {
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(from);
    std::memcpy(address, &v6.sin6_addr, sizeof(address));
    *port = v6.sin6_port;
  }
}

absl::StatusOr<Ends> EndsOf(int fd) {
  sockaddr_storage client = {}, server = {};
  socklen_t client_size = sizeof(client), server_size = sizeof(server);
  if (getpeername(fd, reinterpret_cast<sockaddr*>(&client), &client_size) != 0 ||
      getsockname(fd, reinterpret_cast<sockaddr*>(&server), &server_size) != 0)
    return absl::PermissionDeniedError("the connection is closed");
  Ends ends;
  ends.family = client.ss_family;
  ReadEnd(client, ends.client, &ends.client_port);
  ReadEnd(server, ends.server, &ends.server_port);
  return ends;
}

absl::Status NoLongerThere() {
  return absl::PermissionDeniedError("the other end is closed, or not on this host");
}

// A socket that its process has closed has no user any more: the kernel says 0 then.
absl::StatusOr<uid_t> Open(int state, uint64_t inode, uid_t user) {
  if (state != TCP_ESTABLISHED || inode == 0) return NoLongerThere();
  return user;
}

// Asks the kernel for the socket of the other end (sock_diag(7)). Unavailable: it cannot be asked.
absl::StatusOr<uid_t> AskKernel(const Ends& ends) {
  const int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
  if (fd < 0) return absl::UnavailableError("the kernel has no sock_diag");
  struct {
    nlmsghdr header;
    inet_diag_req_v2 request;
  } question = {};
  question.header.nlmsg_len = sizeof(question);
  question.header.nlmsg_type = SOCK_DIAG_BY_FAMILY;
  question.header.nlmsg_flags = NLM_F_REQUEST;
  question.request.sdiag_family = static_cast<uint8_t>(ends.family);
  question.request.sdiag_protocol = IPPROTO_TCP;
  question.request.idiag_states = ~0u;
  question.request.id.idiag_sport = ends.client_port;
  question.request.id.idiag_dport = ends.server_port;
  std::memcpy(question.request.id.idiag_src, ends.client, sizeof(ends.client));
  std::memcpy(question.request.id.idiag_dst, ends.server, sizeof(ends.server));
  question.request.id.idiag_cookie[0] = question.request.id.idiag_cookie[1] = INET_DIAG_NOCOOKIE;
  alignas(nlmsghdr) char answer[4096];
  ssize_t got = -1;
  if (send(fd, &question, sizeof(question), 0) == static_cast<ssize_t>(sizeof(question)))
    got = recv(fd, answer, sizeof(answer), 0);
  close(fd);
  const auto* header = reinterpret_cast<const nlmsghdr*>(answer);
  if (got < static_cast<ssize_t>(sizeof(nlmsghdr)) || header->nlmsg_len > static_cast<size_t>(got))
    return absl::UnavailableError("sock_diag does not answer");
  if (header->nlmsg_type == NLMSG_ERROR && header->nlmsg_len >= NLMSG_LENGTH(sizeof(nlmsgerr))) {
    const auto* error = static_cast<const nlmsgerr*>(NLMSG_DATA(header));
    // ENOENT may mean that there is no such socket, or that the kernel's module is missing.
    return absl::UnavailableError(absl::StrCat("sock_diag: ", std::strerror(-error->error)));
  }
  if (header->nlmsg_type != SOCK_DIAG_BY_FAMILY ||
      header->nlmsg_len < NLMSG_LENGTH(sizeof(inet_diag_msg)))
    return absl::UnavailableError("sock_diag answers something else");
  const auto* found = static_cast<const inet_diag_msg*>(NLMSG_DATA(header));
  return Open(found->idiag_state, found->idiag_inode, found->idiag_uid);
}

// Returns an end as /proc/net/tcp writes it: words of the address in the order of the processor.
std::string Written(int family, const uint32_t (&address)[4], uint16_t port) {
  std::string text;
  for (int word = 0; word < (family == AF_INET ? 1 : 4); ++word)
    absl::StrAppendFormat(&text, "%08X", address[word]);
  return absl::StrFormat("%s:%04X", text, ntohs(port));
}

}  // namespace

absl::StatusOr<uid_t> UserByTable(int connection_fd) {
  const absl::StatusOr<Ends> ends = EndsOf(connection_fd);
  if (!ends.ok()) return ends.status();
  std::ifstream table(ends->family == AF_INET ? "/proc/self/net/tcp" : "/proc/self/net/tcp6");
  if (!table) return absl::UnavailableError("there is no table of sockets in /proc/self/net");
  const std::string client = Written(ends->family, ends->client, ends->client_port);
  const std::string server = Written(ends->family, ends->server, ends->server_port);
  for (std::string line; std::getline(table, line);) {
    std::istringstream fields(line);
    std::string number, local, remote, state, queues, timer, retransmits, timeout;
    uid_t user = 0;
    uint64_t inode = 0;
    fields >> number >> local >> remote >> state >> queues >> timer >> retransmits >> user >>
        timeout >> inode;
    if (fields && local == client && remote == server)
      return Open(static_cast<int>(std::strtol(state.c_str(), nullptr, 16)), inode, user);
  }
  return NoLongerThere();
}

absl::StatusOr<uid_t> UserOf(int connection_fd) {
  int family = 0;
  socklen_t size = sizeof(family);
  if (getsockopt(connection_fd, SOL_SOCKET, SO_DOMAIN, &family, &size) != 0)
    return absl::ErrnoToStatus(errno, "the connection has no family");
  if (family == AF_UNIX) {
    ucred peer = {};
    size = sizeof(peer);
    if (getsockopt(connection_fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0)
      return absl::ErrnoToStatus(errno, "SO_PEERCRED");
    return peer.uid;
  }
  const absl::StatusOr<Ends> ends = EndsOf(connection_fd);
  if (!ends.ok()) return ends.status();
  absl::StatusOr<uid_t> user = AskKernel(*ends);
  if (absl::IsUnavailable(user.status())) user = UserByTable(connection_fd);
  return user;
}

std::vector<std::string> NamesOf(uid_t user) {
  std::vector<std::string> names;
  passwd entry = {};
  passwd* found = nullptr;
  std::vector<char> room(16 << 10);
  if (getpwuid_r(user, &entry, room.data(), room.size(), &found) == 0 && found != nullptr)
    names.push_back(absl::StrCat("user:", entry.pw_name));
  names.push_back(absl::StrCat("user:", user));
  return names;
}

}  // namespace orlop::server
