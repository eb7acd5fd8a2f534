// The baselines of `bench wire`: meaningless bytes over gRPC streams of raw ByteBuffers and over
// plain sockets, to peer processes that copy them into a buffer of their own. Chunks of 4 MiB,
// several connections to each peer.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "bench/processes.h"

namespace orlop::bench {

inline constexpr size_t kPeerChunkBytes = 4 << 20;
inline constexpr int kConnections = 2;  // to each peer, as the client's default

enum class Wire { kGrpc, kSocket };
enum class Direction { kPush, kPull };

// Two peer processes with kConnections connections each, for both wires.
class BarePeers {
 public:
  static absl::StatusOr<std::unique_ptr<BarePeers>> Start(int count);
  ~BarePeers();

  // Cuts `bytes` into equal parts and moves them over all connections at once. Returns when every
  // byte is in its destination.
  absl::Status Move(Wire wire, Direction direction, absl::Span<char> bytes);
  double CpuSeconds() const;

 private:
  struct Connection {
    std::shared_ptr<grpc::Channel> channel;
    int socket = -1;
    uint32_t number = 0;  // index at its peer
  };
  BarePeers() = default;
  static absl::Status MoveOne(const Connection& connection, Wire wire, Direction direction,
                              absl::Span<char> bytes);

  std::vector<std::unique_ptr<Child>> children_;
  std::vector<Connection> connections_;
};

}  // namespace orlop::bench
