// Framing of v1::Chunk without copying the payload. client/ encodes pushes with it and server/
// encodes pulls; each decodes the other's.
//
//   message = header fields, as protobuf
//           | 0x7A (field 15, length-delimited) | varint payload size | payload bytes
//
// `payload` is the highest field, so every generated client writes the same layout. A message whose
// payload is not last is legal protobuf; the generated parser then decodes it, at the price of a
// copy.
#pragma once

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include <cstddef>
#include <vector>

#include "absl/status/statusor.h"
#include "orlop/v1/types.pb.h"

namespace orlop {

// Returns a message of two slices: the header with the payload's tag and size, and `payload`
// itself, which is shared and not copied. `header.payload` must be empty.
grpc::ByteBuffer EncodeChunk(const v1::Chunk& header, const grpc::Slice& payload);

struct DecodedChunk {
  v1::Chunk header;  // without the payload
  // The payload's parts in order; they share the message's memory.
  std::vector<grpc::Slice> payload;
  size_t payload_bytes = 0;
};

// Decodes a message. Status: InvalidArgument if it is not a Chunk.
absl::StatusOr<DecodedChunk> DecodeChunk(const grpc::ByteBuffer& message);

}  // namespace orlop
