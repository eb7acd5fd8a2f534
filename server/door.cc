#include "server/door.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/codegen/rpc_service_method.h>
#include <grpcpp/security/auth_metadata_processor.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/support/method_handler.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/checksum.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/listener.h"
#include "server/local_users.h"
#include "server/services/arrivals.h"
#include "server/socket_user.h"

namespace orlop::server {

namespace {

constexpr int kHandshakeMs = 10'000;  // until a connection speaks TLS, if it must, and HTTP/2
constexpr int kOwnLanes = 64;
static_assert(kOwnLanes + LocalUsers::kSeats - 1 <= kMaxLanes);
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

// Sees each call while gRPC reads it: counts it, and marks its connection.
class Turnstile : public grpc::AuthMetadataProcessor {
 public:
  // `seat` negative: there is TLS.
  Turnstile(Arrivals* arrivals, int lane, int seat)
      : arrivals_(arrivals), lane_(lane), seat_(seat) {}
  bool IsBlocking() const override { return false; }
  grpc::Status Process(const InputMetadata& metadata, grpc::AuthContext* context, OutputMetadata*,
                       OutputMetadata*) override {
    const auto path = metadata.find(":path");
    const grpc::string_ref method = path == metadata.end() ? "" : path->second;
    // The client repeats the call.
    if (!arrivals_->Begin({method.data(), method.size()}, lane_))
      return {grpc::StatusCode::UNAVAILABLE, "more calls than the server can take now"};
    Arrivals::Mark(lane_, context);
    if (seat_ >= 0) LocalUsers::Mark(seat_, context);
    return grpc::Status::OK;
  }

 private:
  Arrivals* const arrivals_;
  const int lane_, seat_;
};

// The lanes of a door, by number: the seat of each. The server's own user has many, so that a flood
// on one of its connections is known from the others.
std::vector<int> SeatsOfLanes(bool has_users) {
  std::vector<int> seats(kOwnLanes, has_users ? 0 : -1);
  for (int seat = 1; has_users && seat < LocalUsers::kSeats; ++seat) seats.push_back(seat);
  return seats;
}

// Returns a number of the other end's host, without its port.
uint64_t HostOf(int fd) {
  sockaddr_storage address = {};
  socklen_t size = sizeof(address);
  if (getpeername(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0) return 0;
  if (address.ss_family == AF_INET) return reinterpret_cast<sockaddr_in&>(address).sin_addr.s_addr;
  const auto* bytes = reinterpret_cast<sockaddr_in6&>(address).sin6_addr.s6_addr;
  return address.ss_family == AF_INET6 ? Checksum64(bytes, sizeof(in6_addr)) : 0;
}

// Says whose a connection is. With TLS that is not known yet, but the host is.
absl::StatusOr<Listener::Admission> Admit(LocalUsers* users, int most, int fd) {
  static std::atomic<unsigned> next = 0;
  const auto own_lane = static_cast<int>(next++ % kOwnLanes);
  if (users == nullptr) return Listener::Admission{0, most, own_lane, HostOf(fd)};
  const absl::StatusOr<uid_t> user = UserOf(fd);
  if (!user.ok()) return user.status();
  const int seat = users->SeatOf(*user);
  const auto source = static_cast<uint64_t>(seat);
  if (seat == 0) return Listener::Admission{seat, most, own_lane, source};
  return Listener::Admission{seat, seat == LocalUsers::kStrangers ? kStrangersAtOnce : most,
                             kOwnLanes + seat - 1, source};
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
  listening.take = [door = door.get()](int lane, int listener_fd, int fd) {
    Acceptor::NewConnectionParameters connection;
    connection.listener_fd = listener_fd;
    connection.fd = fd;
    door->acceptors_[static_cast<size_t>(lane)]->HandleNewConnection(&connection);
  };
  absl::StatusOr<std::unique_ptr<Listener>> listener = Listener::Open(std::move(listening));
  if (!listener.ok())
    return Annotated(listener.status(), absl::StrCat(options.flag, " ", options.address));
  door->listener_ = *std::move(listener);
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  const bool is_unix = absl::StartsWith(options.address, "unix:");
  for (const int seat : SeatsOfLanes(options.users != nullptr)) {
    const auto credentials =
        seat < 0 ? options.credentials()
                 : grpc::experimental::LocalServerCredentials(is_unix ? UDS : LOCAL_TCP);
    credentials->SetAuthMetadataProcessor(std::make_shared<Turnstile>(
        &options.gate->arrivals(), static_cast<int>(door->acceptors_.size()), seat));
    door->acceptors_.push_back(builder.experimental().AddExternalConnectionAcceptor(
        grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD, credentials));
  }
  options.gate->arrivals().SetOnFlood(
      [listener = door->listener_.get()](int lane) { listener->Cut(lane); });
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
