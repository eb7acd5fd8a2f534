// The peer process of the baselines. It receives into, and sends from, one buffer per connection.
#include <grpcpp/impl/rpc_service_method.h>
#include <grpcpp/support/method_handler.h>
#include <grpcpp/support/sync_stream.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "bench/bench.h"
#include "bench/peer.h"
#include "bench/peer_wire.h"
#include "cli/print/print.h"
#include "proto/limits.h"

namespace orlop::bench {
namespace {

constexpr uint64_t kMaxBytes = uint64_t{1} << 36;

// One buffer per connection. A connection carries one transfer at a time.
class Buffers {
 public:
  // Returns null if the request is out of range.
  char* Get(const Start& start) {
    if (start.connection >= buffers_.size() || start.bytes > kMaxBytes) return nullptr;
    std::vector<char>& buffer = buffers_[start.connection];
    if (buffer.size() < start.bytes) buffer.resize(start.bytes);
    return buffer.data();
  }

 private:
  std::array<std::vector<char>, 16> buffers_;
};

class PeerService : public grpc::Service {
 public:
  explicit PeerService(Buffers* buffers) : buffers_(buffers) {
    using grpc::internal::RpcMethod;
    AddMethod(new grpc::internal::RpcServiceMethod(
        kPushMethod, RpcMethod::CLIENT_STREAMING,
        new grpc::internal::ClientStreamingHandler<PeerService, grpc::ByteBuffer, grpc::ByteBuffer>(
            [](PeerService* self, grpc::ServerContext*,
               grpc::ServerReader<grpc::ByteBuffer>* reader,
               grpc::ByteBuffer* answer) { return self->Push(reader, answer); },
            this)));
    AddMethod(new grpc::internal::RpcServiceMethod(
        kPullMethod, RpcMethod::SERVER_STREAMING,
        new grpc::internal::ServerStreamingHandler<PeerService, grpc::ByteBuffer, grpc::ByteBuffer>(
            [](PeerService* self, grpc::ServerContext*, const grpc::ByteBuffer* request,
               grpc::ServerWriter<grpc::ByteBuffer>* writer) {
              return self->Pull(*request, writer);
            },
            this)));
  }

 private:
  grpc::Status Push(grpc::ServerReader<grpc::ByteBuffer>* reader, grpc::ByteBuffer* answer) {
    grpc::ByteBuffer message;
    Start start;
    char* to =
        reader->Read(&message) && FromMessage(message, &start) ? buffers_->Get(start) : nullptr;
    if (to == nullptr) return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "no start");
    uint64_t received = 0;
    for (message.Clear(); reader->Read(&message); message.Clear())
      received += CopyMessage(message, to + received, start.bytes - received);
    *answer = ToMessage(start);
    return received == start.bytes ? grpc::Status::OK
                                   : grpc::Status(grpc::StatusCode::DATA_LOSS, "too little");
  }

  grpc::Status Pull(const grpc::ByteBuffer& request, grpc::ServerWriter<grpc::ByteBuffer>* writer) {
    Start start;
    const char* from = FromMessage(request, &start) ? buffers_->Get(start) : nullptr;
    if (from == nullptr) return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "no start");
    for (uint64_t offset = 0; offset < start.bytes; offset += kPeerChunkBytes)
      if (!writer->Write(
              Borrow(from + offset, std::min<uint64_t>(kPeerChunkBytes, start.bytes - offset))))
        break;
    return grpc::Status::OK;
  }

  Buffers* const buffers_;
};

void ServeSocket(int socket, Buffers* buffers) {
  const int on = 1;
  setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  Start start;
  char done = 1;
  while (ReceiveAll(socket, reinterpret_cast<char*>(&start), sizeof start)) {
    char* bytes = buffers->Get(start);
    if (bytes == nullptr) break;
    const bool moved = start.pull != 0
                           ? SendAll(socket, bytes, start.bytes) && ReceiveAll(socket, &done, 1)
                           : ReceiveAll(socket, bytes, start.bytes) && SendAll(socket, &done, 1);
    if (!moved) break;
  }
  close(socket);
}

// Accepts exactly kConnections connections and serves each until its other end closes.
void ServeSockets(int listener, Buffers* buffers) {
  std::vector<std::thread> threads;
  threads.reserve(kConnections);
  for (int i = 0; i < kConnections; ++i)
    threads.emplace_back(ServeSocket, accept4(listener, nullptr, nullptr, SOCK_CLOEXEC), buffers);
  for (std::thread& thread : threads) thread.join();
}

int ListenOnLoopback(int* port) {
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  if (bind(listener, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      listen(listener, kConnections) != 0)
    return -1;
  getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);
  *port = ntohs(address.sin_port);
  return listener;
}

}  // namespace

int ServePeer() {
  Buffers grpc_buffers, socket_buffers;
  PeerService service(&grpc_buffers);
  int grpc_port = 0, socket_port = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &grpc_port);
  builder.RegisterService(&service);
  builder.SetMaxReceiveMessageSize(-1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kHttp2FrameBytes);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  const int listener = ListenOnLoopback(&socket_port);
  if (server == nullptr || listener < 0) return cli::kFailed;
  std::printf("%d %d\n", grpc_port, socket_port);
  std::fflush(stdout);
  ServeSockets(listener, &socket_buffers);  // until the parent closes its sockets
  server->Shutdown();
  return cli::kOk;
}

}  // namespace orlop::bench
