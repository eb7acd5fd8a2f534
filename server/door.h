// A door: one address on which a gate answers calls. A server has one for workers and
// `orlop`, and in a cluster one for its peers, which workers cannot use.
#pragma once

#include <grpcpp/grpcpp.h>
#include <grpcpp/security/server_credentials.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/listener.h"
#include "server/local_users.h"
#include "server/services/gate.h"

namespace orlop::server {

class Door {
 public:
  struct Options {
    std::string flag;     // that gives the address, for errors: --listen
    std::string address;  // host:port (port 0: the system chooses) or unix:/path
    // Makes credentials of TLS, with which the door has several acceptors; null: no TLS.
    std::function<std::shared_ptr<grpc::ServerCredentials>()> credentials;
    LocalUsers* users = nullptr;  // without TLS: who may be here; it must outlive the door
    bool is_for_others = false;   // without TLS: users other than the server's too
    int max_connections = 0;
    Gate* gate = nullptr;               // answers every call; it must outlive the door
    std::vector<std::string> services;  // "orlop.v1.Job", which gRPC's reflection lists
    int max_message_bytes = 0;          // of a request; a longer one is not read
  };
  // Opens a door. Calls are answered when this returns.
  //   Status  as Listener::Open
  static absl::StatusOr<std::unique_ptr<Door>> Open(const Options& options);

  // Returns the address with the actual port, or unix:/path.
  const std::string& address() const { return listener_->address(); }
  // Tells grpc.health.v1 whether the server serves; it does not until this is called.
  void SetServing(bool is_serving);
  // Ends all calls. Those that are answered within a second end by themselves.
  void Close();

 private:
  using Acceptor = grpc::experimental::ExternalConnectionAcceptor;

  std::vector<std::unique_ptr<grpc::Service>> names_;
  std::vector<std::unique_ptr<Acceptor>> acceptors_;  // by lane
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Listener> listener_;
};

}  // namespace orlop::server
