#include "proto/chunk.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/limits.h"

namespace orlop {
namespace {

using google::protobuf::io::CodedInputStream;
using google::protobuf::io::CodedOutputStream;

constexpr uint8_t kPayloadTag = 15 << 3 | 2;
constexpr size_t kMaxHeaderBytes = 64 << 10;

// The position of the payload in a message. FindPayload sets it.
struct PayloadPosition {
  size_t header_bytes = 0;
  size_t payload_offset = 0;
  size_t payload_bytes = 0;
};

// Walks the top-level fields up to the payload's tag. Returns false if it is not in these bytes.
bool FindPayload(const uint8_t* bytes, size_t size, PayloadPosition* position) {
  CodedInputStream in(bytes, static_cast<int>(size));
  while (true) {
    const int before = in.CurrentPosition();
    const uint32_t tag = in.ReadTag();
    if (tag == 0) return false;
    if (tag == kPayloadTag) {
      // CodedInputStream cuts a number to its type. The generated parser refuses a tag or a size
      // that is longer, and decodes a message that this function does not.
      uint64_t payload_bytes = 0;
      if (in.CurrentPosition() - before != 1 || !in.ReadVarint64(&payload_bytes)) return false;
      if (payload_bytes > kMaxMessageBytes) return false;
      *position = {static_cast<size_t>(before), static_cast<size_t>(in.CurrentPosition()),
                   payload_bytes};
      return true;
    }
    uint64_t skipped = 0;
    uint32_t length = 0, word = 0;
    switch (tag & 7) {
      case 0:
        if (!in.ReadVarint64(&skipped)) return false;
        break;
      case 1:
        if (!in.ReadLittleEndian64(&skipped)) return false;
        break;
      case 2:
        if (!in.ReadVarint32(&length) || !in.Skip(static_cast<int>(length))) return false;
        break;
      case 5:
        if (!in.ReadLittleEndian32(&word)) return false;
        break;
      default:
        return false;
    }
  }
}

// Joins the first `limit` bytes of a message whose first slice does not hold the whole header.
std::string Prefix(const std::vector<grpc::Slice>& slices, size_t limit) {
  std::string prefix;
  for (const grpc::Slice& slice : slices) {
    if (prefix.size() >= limit) break;
    prefix.append(reinterpret_cast<const char*>(slice.begin()),
                  std::min(slice.size(), limit - prefix.size()));
  }
  return prefix;
}

// Returns the slices from byte `offset` on, without copying.
std::vector<grpc::Slice> Tail(const std::vector<grpc::Slice>& slices, size_t offset) {
  std::vector<grpc::Slice> tail;
  for (const grpc::Slice& slice : slices) {
    if (offset >= slice.size()) {
      offset -= slice.size();
    } else {
      tail.push_back(offset == 0 ? slice : slice.sub(offset, slice.size()));
      offset = 0;
    }
  }
  return tail;
}

// Decodes a message with the generated parser: its fields are in another order, it has no payload,
// or it is damaged.
absl::StatusOr<DecodedChunk> DecodeByCopy(const std::vector<grpc::Slice>& slices, size_t size) {
  DecodedChunk chunk;
  if (!chunk.header.ParseFromString(Prefix(slices, size)))
    return absl::InvalidArgumentError("message is not an orlop.v1.Chunk");
  std::unique_ptr<std::string> payload(chunk.header.release_payload());
  if (payload != nullptr && !payload->empty()) chunk.payload.emplace_back(*payload);
  chunk.payload_bytes = payload == nullptr ? 0 : payload->size();
  return chunk;
}

}  // namespace

grpc::ByteBuffer EncodeChunk(const v1::Chunk& header, const grpc::Slice& payload) {
  const size_t header_bytes = header.ByteSizeLong();
  std::string prefix(header_bytes + 6, '\0');
  uint8_t* end = header.SerializeWithCachedSizesToArray(reinterpret_cast<uint8_t*>(prefix.data()));
  if (payload.size() > 0) {
    *end++ = kPayloadTag;
    end = CodedOutputStream::WriteVarint32ToArray(static_cast<uint32_t>(payload.size()), end);
  }
  prefix.resize(end - reinterpret_cast<uint8_t*>(prefix.data()));
  const grpc::Slice slices[] = {grpc::Slice(prefix), payload};
  return grpc::ByteBuffer(slices, payload.size() > 0 ? 2 : 1);
}

absl::StatusOr<DecodedChunk> DecodeChunk(const grpc::ByteBuffer& message) {
  const size_t size = message.Length();
  std::vector<grpc::Slice> slices;
  if (!message.Dump(&slices).ok()) return absl::InvalidArgumentError("message cannot be read");
  if (size > kMaxMessageBytes)
    return absl::InvalidArgumentError("message is longer than the limit of a Chunk");
  PayloadPosition position;
  const bool first_is_enough =
      !slices.empty() && FindPayload(slices[0].begin(), slices[0].size(), &position);
  std::string prefix;
  const uint8_t* bytes = first_is_enough ? slices[0].begin() : nullptr;
  if (!first_is_enough) {
    prefix = Prefix(slices, kMaxHeaderBytes);
    bytes = reinterpret_cast<const uint8_t*>(prefix.data());
    if (!FindPayload(bytes, prefix.size(), &position)) return DecodeByCopy(slices, size);
  }
  if (position.payload_offset + position.payload_bytes != size) return DecodeByCopy(slices, size);
  DecodedChunk chunk;
  if (!chunk.header.ParseFromArray(bytes, static_cast<int>(position.header_bytes)))
    return absl::InvalidArgumentError("message is not an orlop.v1.Chunk");
  chunk.payload = Tail(slices, position.payload_offset);
  chunk.payload_bytes = position.payload_bytes;
  return chunk;
}

}  // namespace orlop
