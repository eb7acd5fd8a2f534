#include "bench/peer.h"

#include <grpcpp/support/sync_stream.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "bench/peer_wire.h"
#include "bench/processes.h"
#include "proto/limits.h"
#include "proto/status.h"

namespace orlop::bench {
namespace {

using grpc::internal::RpcMethod;

absl::StatusOr<int> ConnectTo(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0) return fd;
  close(fd);
  return absl::UnavailableError("cannot connect to the peer process");
}

std::shared_ptr<grpc::Channel> ChannelTo(int port) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kHttp2FrameBytes);
  arguments.SetMaxReceiveMessageSize(-1);
  return grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(port),
                                   grpc::InsecureChannelCredentials(), arguments);
}

absl::Status GrpcPush(const std::shared_ptr<grpc::Channel>& channel, const Start& start,
                      absl::Span<char> bytes) {
  grpc::ClientContext context;
  grpc::ByteBuffer answer;
  std::unique_ptr<grpc::ClientWriter<grpc::ByteBuffer>> writer(
      grpc::internal::ClientWriterFactory<grpc::ByteBuffer>::Create(
          channel.get(), RpcMethod(kPushMethod, RpcMethod::CLIENT_STREAMING, channel), &context,
          &answer));
  writer->Write(ToMessage(start));
  for (size_t offset = 0; offset < bytes.size(); offset += kPeerChunkBytes)
    if (!writer->Write(Borrow(&bytes[offset], std::min(kPeerChunkBytes, bytes.size() - offset))))
      break;
  writer->WritesDone();
  return FromGrpc(writer->Finish());
}

absl::Status GrpcPull(const std::shared_ptr<grpc::Channel>& channel, const Start& start,
                      absl::Span<char> bytes) {
  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientReader<grpc::ByteBuffer>> reader(
      grpc::internal::ClientReaderFactory<grpc::ByteBuffer>::Create(
          channel.get(), RpcMethod(kPullMethod, RpcMethod::SERVER_STREAMING, channel), &context,
          ToMessage(start)));
  size_t received = 0;
  for (grpc::ByteBuffer message; reader->Read(&message); message.Clear())
    received += CopyMessage(message, bytes.data() + received, bytes.size() - received);
  const absl::Status status = FromGrpc(reader->Finish());
  return status.ok() && received != bytes.size() ? absl::DataLossError("the peer sent too little")
                                                 : status;
}

absl::Status SocketMove(int socket, Start start, absl::Span<char> bytes) {
  char done = 1;
  const bool moved =
      SendAll(socket, reinterpret_cast<char*>(&start), sizeof start) &&
      (start.pull != 0
           ? ReceiveAll(socket, bytes.data(), bytes.size()) && SendAll(socket, &done, 1)
           : SendAll(socket, bytes.data(), bytes.size()) && ReceiveAll(socket, &done, 1));
  return moved ? absl::OkStatus() : absl::UnavailableError("the peer process closed its socket");
}

}  // namespace

absl::StatusOr<std::unique_ptr<BarePeers>> BarePeers::Start(int count) {
  std::unique_ptr<BarePeers> peers(new BarePeers());
  for (int i = 0; i < count; ++i) {
    auto child = Child::Start({SiblingProgram("orlop"), "bench-peer"}, true);
    if (!child.ok()) return child.status();
    int grpc_port = 0, socket_port = 0;
    const std::string ports = (*child)->ReadLine();
    if (std::sscanf(ports.c_str(), "%d %d", &grpc_port, &socket_port) != 2)
      return absl::UnavailableError("the peer process did not start");
    for (uint32_t number = 0; number < kConnections; ++number) {
      const absl::StatusOr<int> socket = ConnectTo(socket_port);
      if (!socket.ok()) return socket.status();
      peers->connections_.push_back({ChannelTo(grpc_port), *socket, number});
      // gRPC's first connect may fail, and a later one succeed.
      if (!peers->connections_.back().channel->WaitForConnected(std::chrono::system_clock::now() +
                                                                std::chrono::seconds(30)))
        return absl::UnavailableError("no connection to the peer process within 30 s");
    }
    peers->children_.push_back(*std::move(child));
  }
  return peers;
}

BarePeers::~BarePeers() {
  for (const Connection& connection : connections_) close(connection.socket);
}

absl::Status BarePeers::MoveOne(const Connection& connection, Wire wire, Direction direction,
                                absl::Span<char> bytes) {
  const bench::Start start{bytes.size(), connection.number, direction == Direction::kPull};
  if (wire == Wire::kSocket) return SocketMove(connection.socket, start, bytes);
  return direction == Direction::kPush ? GrpcPush(connection.channel, start, bytes)
                                       : GrpcPull(connection.channel, start, bytes);
}

absl::Status BarePeers::Move(Wire wire, Direction direction, absl::Span<char> bytes) {
  const size_t count = connections_.size(), each = bytes.size() / count;
  std::vector<absl::Status> statuses(count);
  std::vector<std::thread> threads;
  threads.reserve(count);
  for (size_t i = 0; i < count; ++i)
    threads.emplace_back([&, i] {
      statuses[i] = MoveOne(connections_[i], wire, direction,
                            bytes.subspan(i * each, i + 1 < count ? each : bytes.npos));
    });
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& status : statuses)
    if (!status.ok()) return status;
  return absl::OkStatus();
}

double BarePeers::CpuSeconds() const {
  double seconds = 0;
  for (const auto& child : children_) seconds += child->CpuSeconds();
  return seconds;
}

}  // namespace orlop::bench
