#include "server/door.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/codegen/rpc_service_method.h>
#include <grpcpp/support/method_handler.h>

#include <chrono>
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
#include "server/socket_path.h"

namespace orlop::server {

namespace {

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

}  // namespace

absl::StatusOr<std::unique_ptr<Door>> Door::Open(const Options& options) {
  auto door = std::make_unique<Door>();
  const bool is_unix = absl::StartsWith(options.address, "unix:");
  if (is_unix) {
    absl::StatusOr<SocketPath> taken = SocketPath::Take(options.address.substr(5));
    if (!taken.ok())
      return Annotated(taken.status(), absl::StrCat(options.flag, " ", options.address));
    door->path_ = *std::move(taken);
  }
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(options.address, options.credentials, &port);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
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
        absl::StrCat(options.flag, " ", options.address, " cannot be bound: in use?"));
  door->address_ =
      is_unix ? options.address
              : absl::StrCat(options.address.substr(0, options.address.rfind(':')), ":", port);
  door->SetServing(false);
  return door;
}

void Door::SetServing(bool is_serving) {
  server_->GetHealthCheckService()->SetServingStatus(is_serving);
}

void Door::Close() {
  server_->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(1));
}

}  // namespace orlop::server
