// The users of this host who call a server without TLS.
//
// The user who runs the server may do everything, and so may root, who could become that user.
// Others may do what the file of --roles grants to "user:NAME"; without it they may do nothing.
//
// gRPC tells a handler nothing of a Unix socket's other end. So each user has a seat: an acceptor
// of gRPC with credentials of its own, so that its connections can be marked.
#pragma once

#include <grpcpp/security/auth_context.h>
#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "base/mutex.h"
#include "server/role_file.h"
#include "server/services/roles.h"

namespace orlop::server {

class LocalUsers {
 public:
  // The first seat is of the user who runs the server, the second of root, and the third of all
  // users to whom nothing is granted. A seat is never given to another user.
  static constexpr int kSeats = 32;
  static constexpr int kStrangers = 2;

  // `file` null: nothing is granted to other users. It must outlive this object.
  explicit LocalUsers(const RoleFile* file);

  // Returns the seat of a user; kStrangers too if all others are taken. May ask the system for the
  // user's name.
  //   Threads  any; likewise Of
  int SeatOf(uid_t user);
  // Returns who has made a connection that is marked.
  std::shared_ptr<const Identity> Of(const grpc::AuthContext& context) const;

  // Marks a connection as a seat's, at its first call.
  static void Mark(int seat, grpc::AuthContext* context);

 private:
  struct Guest {
    uid_t user;
    std::vector<std::string> names;
  };

  const RoleFile* const file_;
  const uid_t self_;
  const std::shared_ptr<const Identity> owner_, root_, stranger_;
  mutable Mutex mutex_;
  std::vector<Guest> guests_ GUARDED_BY(mutex_);  // by seat, from the seat after kStrangers
};

}  // namespace orlop::server
