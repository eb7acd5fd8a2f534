// The certificates of a server, for those who call it and for its own calls to other servers.
#pragma once

#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>

#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "server/config.h"

namespace orlop::server {

struct Credentials {
  std::function<std::shared_ptr<grpc::ServerCredentials>()> server;  // makes them; null: no TLS
  std::shared_ptr<grpc::ChannelCredentials> channel;
};

// Returns mutual TLS with the certificate, key and authority of `options`, or no encryption if they
// name none. A client must show a certificate of the same authority. The files are read again when
// they change, by gRPC's experimental TLS credentials, which nothing else uses.
//   Status  InvalidArgument: a file cannot be read, or is empty
absl::StatusOr<Credentials> MakeCredentials(const Options& options);

}  // namespace orlop::server
