// The protocol of the baselines' two ends.
//   gRPC    /orlop.bench.Peer/Push: the first message is Start, then chunks; the answer is empty.
//           /orlop.bench.Peer/Pull: the request is Start; the answer is chunks.
//   socket  Start, then the bytes in the direction that it names, then one byte from the receiver.
#pragma once

#include <grpcpp/grpcpp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>

namespace orlop::bench {

inline constexpr char kPushMethod[] = "/orlop.bench.Peer/Push";
inline constexpr char kPullMethod[] = "/orlop.bench.Peer/Pull";

struct Start {
  uint64_t bytes = 0;
  uint32_t connection = 0;  // index of the peer's buffer
  uint32_t pull = 0;        // 1: pull; sockets only
};

inline grpc::ByteBuffer ToMessage(const Start& start) {
  const grpc::Slice slice(&start, sizeof start);
  return grpc::ByteBuffer(&slice, 1);
}

inline bool FromMessage(const grpc::ByteBuffer& message, Start* start) {
  grpc::Slice slice;
  if (!message.DumpToSingleSlice(&slice).ok() || slice.size() != sizeof *start) return false;
  std::memcpy(start, slice.begin(), sizeof *start);
  return true;
}

// Copies a message to `to`. Returns its size, or 0 if it has more than `room` bytes.
inline size_t CopyMessage(const grpc::ByteBuffer& message, char* to, size_t room) {
  std::vector<grpc::Slice> slices;
  if (!message.Dump(&slices).ok() || message.Length() > room) return 0;
  for (const grpc::Slice& slice : slices) {
    std::memcpy(to, slice.begin(), slice.size());
    to += slice.size();
  }
  return message.Length();
}

// Makes a message over memory that must outlive it.
inline grpc::ByteBuffer Borrow(const char* bytes, size_t size) {
  const grpc::Slice slice(const_cast<char*>(bytes), size, grpc::Slice::STATIC_SLICE);
  return grpc::ByteBuffer(&slice, 1);
}

inline bool SendAll(int socket, const char* bytes, size_t size) {
  while (size > 0) {
    const ssize_t sent = send(socket, bytes, size, MSG_NOSIGNAL);
    if (sent <= 0 && errno != EINTR) return false;
    if (sent > 0) bytes += sent, size -= static_cast<size_t>(sent);
  }
  return true;
}

inline bool ReceiveAll(int socket, char* bytes, size_t size) {
  while (size > 0) {
    const ssize_t got = recv(socket, bytes, size, 0);
    if (got == 0 || (got < 0 && errno != EINTR)) return false;
    if (got > 0) bytes += got, size -= static_cast<size_t>(got);
  }
  return true;
}

}  // namespace orlop::bench
