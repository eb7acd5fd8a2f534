#include "server/door.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/codegen/rpc_service_method.h>
#include <grpcpp/support/method_handler.h>
#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/listener.h"
#include "server/local_users.h"
#include "server/socket_user.h"

namespace orlop::server {

namespace {

constexpr int kHandshakeMs = 10'000;  // until a connection speaks TLS, if it must, and HTTP/2
constexpr int kStrangersAtOnce = 16;  // connections of users who may do nothing but be told so

// Names a service whose methods a gate answers, so that gRPC's reflection lists it: it lists those
// that have a registered method. Nobody calls this one.
class Name : public grpc::Service {
 public:
  explicit Name(const std::string& service) : path_(absl::StrCat("/", service, "/-")) {
    AddMethod(new grpc::internal::RpcServiceMethod(path_.c_str(),
                                                   grpc::internal::RpcMethod::NORMAL_RPC,
                                                   new grpc::internal::UnknownMethodHandler("")));
  }

 private:
  const std::string path_;
};

// Says whose a connection is: of a seat, or with TLS, of the only kind there is.
absl::StatusOr<Listener::Admission> Admit(LocalUsers* users, int most, int fd) {
  if (users == nullptr) return Listener::Admission{0, most};
  const absl::StatusOr<uid_t> user = UserOf(fd);
  if (!user.ok()) return user.status();
  const int seat = users->SeatOf(*user);
  return Listener::Admission{seat, seat == LocalUsers::kStrangers ? kStrangersAtOnce : most};
}

}  // namespace

absl::StatusOr<std::unique_ptr<Door>> Door::Open(const Options& options) {
  auto door = std::make_unique<Door>();
  Listener::Options listening;
  listening.address = options.address;
  listening.most_connections = options.max_connections;
  listening.is_for_others = options.is_for_others;
  listening.admit = [users = options.users, most = options.max_connections](int fd) {
    return Admit(users, most, fd);
  };
  listening.take = [door = door.get()](int kind, int listener_fd, int fd) {
    Acceptor::NewConnectionParameters connection;
    connection.listener_fd = listener_fd;
    connection.fd = fd;
    door->acceptors_[static_cast<size_t>(kind)]->HandleNewConnection(&connection);
  };
  absl::StatusOr<std::unique_ptr<Listener>> listener = Listener::Open(std::move(listening));
  if (!listener.ok())
    return Annotated(listener.status(), absl::StrCat(options.flag, " ", options.address));
  door->listener_ = *std::move(listener);
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  const bool is_unix = absl::StartsWith(options.address, "unix:");
  for (int seat = 0; seat < (options.credentials != nullptr ? 1 : LocalUsers::kSeats); ++seat) {
    door->acceptors_.push_back(builder.experimental().AddExternalConnectionAcceptor(
        grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD,
        options.credentials != nullptr ? options.credentials
                                       : LocalUsers::CredentialsOf(seat, is_unix)));
  }
  builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, kHandshakeMs);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kHttp2FrameBytes);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 60'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 1'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  // A compressed message may be a thousand times larger than what was received: none is accepted.
  builder.AddChannelArgument(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0);
  for (const auto algorithm : {GRPC_COMPRESS_DEFLATE, GRPC_COMPRESS_GZIP})
    builder.SetCompressionAlgorithmSupportStatus(algorithm, false);
  builder.SetMaxReceiveMessageSize(options.max_message_bytes);
  builder.SetMaxSendMessageSize(static_cast<int>(kMaxPeerMessageBytes));
  // Only gRPC's own services, health and reflection, have threads of their own.
  grpc::ResourceQuota quota(options.flag);
  quota.SetMaxThreads(kMaxServerThreads);
  builder.SetResourceQuota(quota);
  builder.SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::NUM_CQS, 1);
  builder.SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::MAX_POLLERS, 1);
  for (const std::string& service : options.services)
    builder.RegisterService(door->names_.emplace_back(std::make_unique<Name>(service)).get());
  builder.RegisterCallbackGenericService(options.gate);
  door->server_ = builder.BuildAndStart();
  if (door->server_ == nullptr)
    return absl::UnavailableError(
        absl::StrCat(options.flag, " ", options.address, ": gRPC does not start"));
  door->SetServing(false);
  door->listener_->Start();
  return door;
}

void Door::SetServing(bool is_serving) {
  server_->GetHealthCheckService()->SetServingStatus(is_serving);
}

void Door::Close() {
  listener_->Close();
  server_->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(1));
}

}  // namespace orlop::server
