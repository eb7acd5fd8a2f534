// Which user of this host is at the other end of a connection. The kernel says so; the caller has
// no part in it.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace orlop::server {

// Returns the effective user of the process that has made a connection: of a Unix socket by
// SO_PEERCRED, of TCP within this host by the kernel's table of sockets (sock_diag, or
// /proc/net/tcp where the kernel has no sock_diag).
//   Status  PermissionDenied: the other end is closed, or in another network. Unavailable: the
//           kernel does not tell.
absl::StatusOr<uid_t> UserOf(int connection_fd);
// The same for a TCP connection, by /proc/net/tcp alone.
absl::StatusOr<uid_t> UserByTable(int connection_fd);

// Returns the names under which a file of --roles may grant something to a user: "user:alice" and
// "user:1001".
std::vector<std::string> NamesOf(uid_t user);

}  // namespace orlop::server
