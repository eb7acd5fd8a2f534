// Framing of v1::Chunk without copying the payload. Called by client/ (push) and server/ (pull),
// and on the other side to decode.
//
//   message = header fields, as protobuf | 0x7A (field 15, length-delimited) | varint payload size
//   | payload bytes
//
// `payload` is the highest field, so this is also what every generated client writes. A message
// whose payload does not come last is legal protobuf and is decoded through the generated parser,
// at the price of a copy.
#pragma once

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include <cstddef>
#include <vector>

#include "absl/status/statusor.h"
#include "orlop/v1/types.pb.h"

namespace orlop {

// A message of two slices: header with the payload's tag and size, and `payload` itself, shared and
// not copied. `header.payload` must be empty.
grpc::ByteBuffer EncodeChunk(const v1::Chunk& header, const grpc::Slice& payload);

struct DecodedChunk {
  v1::Chunk header;                  // without payload
  std::vector<grpc::Slice> payload;  // parts in order, sharing the message's memory
  size_t payload_bytes = 0;
};

// InvalidArgument if the bytes are no Chunk.
absl::StatusOr<DecodedChunk> DecodeChunk(const grpc::ByteBuffer& message);

}  // namespace orlop
