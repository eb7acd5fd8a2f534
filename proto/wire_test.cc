// Tests the parts of the wire format: chunks, checksums (base/checksum.h), statuses and dtypes.
#include <gtest/gtest.h>
#include <xxhash.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "base/checksum.h"
#include "orlop/v1/types.pb.h"
#include "proto/chunk.h"
#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/status.h"

namespace orlop {
namespace {

// Returns a chunk without a payload.
v1::Chunk Header() {
  v1::Chunk header;
  header.mutable_key()->set_job("job");
  header.mutable_region()->set_tensor("layers.0.weight");
  header.set_offset_bytes(3 << 20);
  header.set_checksum(0x0123456789abcdef);
  header.set_applied_count(7);
  return header;
}

grpc::ByteBuffer InSlicesOf(const std::string& bytes, size_t size) {
  std::vector<grpc::Slice> slices;
  for (size_t i = 0; i < bytes.size(); i += size) slices.emplace_back(bytes.substr(i, size));
  return grpc::ByteBuffer(slices.data(), slices.size());
}

std::string Joined(const std::vector<grpc::Slice>& slices) {
  std::string joined;
  for (const grpc::Slice& slice : slices)
    joined.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  return joined;
}

std::string Flat(const grpc::ByteBuffer& message) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(message.Dump(&slices).ok());
  return Joined(slices);
}

TEST(Chunk, EncodesWhatGeneratedCodeParsesAndSharesThePayload) {
  const std::string payload(100'000, 'x');
  const grpc::Slice slice(payload.data(), payload.size(), grpc::Slice::STATIC_SLICE);
  const grpc::ByteBuffer message = EncodeChunk(Header(), slice);
  std::vector<grpc::Slice> slices;
  ASSERT_TRUE(message.Dump(&slices).ok());
  ASSERT_EQ(slices.size(), 2u);
  EXPECT_EQ(static_cast<const void*>(slices[1].begin()), payload.data());
  v1::Chunk parsed;
  ASSERT_TRUE(parsed.ParseFromString(Flat(message)));
  EXPECT_EQ(parsed.payload(), payload);
  parsed.clear_payload();
  EXPECT_EQ(parsed.SerializeAsString(), Header().SerializeAsString());
}

TEST(Chunk, DecodesGeneratedBytesInSlicesOfAnySize) {
  v1::Chunk chunk = Header();
  chunk.set_payload(std::string(70'000, 'y'));
  const std::string bytes = chunk.SerializeAsString();
  for (size_t size : {1ul, 2ul, 7ul, 50ul, 8192ul, 65'536ul, bytes.size()}) {
    const auto decoded = DecodeChunk(InSlicesOf(bytes, size));
    ASSERT_TRUE(decoded.ok()) << size << decoded.status();
    EXPECT_EQ(decoded->header.SerializeAsString(), Header().SerializeAsString());
    EXPECT_EQ(decoded->payload_bytes, 70'000u);
    EXPECT_EQ(Joined(decoded->payload), chunk.payload());
  }
}

TEST(Chunk, DecodesFieldsInAnyOrderAndNoPayload) {
  v1::Chunk payload_only;
  payload_only.set_payload("abc");
  const auto decoded =
      DecodeChunk(InSlicesOf(payload_only.SerializeAsString() + Header().SerializeAsString(), 16));
  ASSERT_TRUE(decoded.ok());
  EXPECT_EQ(decoded->header.SerializeAsString(), Header().SerializeAsString());
  EXPECT_EQ(Joined(decoded->payload), "abc");
  const auto empty = DecodeChunk(EncodeChunk(Header(), grpc::Slice()));
  ASSERT_TRUE(empty.ok());
  EXPECT_EQ(empty->payload_bytes, 0u);
}

TEST(Chunk, RefusesGarbageWithoutCrashing) {
  std::mt19937 random(1);
  for (int trial = 0; trial < 20'000; ++trial) {
    // 0x7A is the tag of the payload, field 15; 5 is its size.
    std::string bytes = Header().SerializeAsString() + std::string("\x7a\x05hello", 7);
    for (int flips = 0; flips < 3; ++flips) bytes[random() % bytes.size()] ^= 1 << random() % 8;
    bytes.resize(1 + random() % bytes.size());
    const auto decoded = DecodeChunk(InSlicesOf(bytes, 1 + random() % 40));
    if (decoded.ok()) {
      EXPECT_EQ(Joined(decoded->payload).size(), decoded->payload_bytes);
    }
  }
  EXPECT_EQ(
      DecodeChunk(InSlicesOf(std::string(kMaxMessageBytes + 1, 'z'), 1 << 20)).status().code(),
      absl::StatusCode::kInvalidArgument);
}

// Each payload tag or size has bits beyond those that the decoder keeps. The generated parser
// refuses them, and so does the decoder, since others would read another message.
TEST(Chunk, RefusesTagsAndSizesThatTheParserRefuses) {
  for (const std::string& payload : {std::string("\x7a\x82\x80\x80\x80\x10xy", 8),
                                     std::string("\xfa\x80\x80\x80\x80\x00\x02xy", 9)}) {
    const std::string bytes = Header().SerializeAsString() + payload;
    EXPECT_FALSE(v1::Chunk().ParseFromString(bytes));
    EXPECT_FALSE(DecodeChunk(InSlicesOf(bytes, bytes.size())).ok());
  }
}

// A leaf is the unit of hashing: kLeafBytes (1 MiB) of a chunk.
TEST(Checksum, StreamedLeavesEqualWholeLeavesAtAnyCut) {
  std::mt19937_64 random(2);
  std::string bytes(3 * kLeafBytes + 12'345, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  const std::vector<uint64_t> leaves = LeafHashes(absl::MakeConstSpan(bytes));
  ASSERT_EQ(leaves.size(), 4u);
  EXPECT_EQ(leaves[3], XXH3_64bits(bytes.data() + 3 * kLeafBytes, 12'345));
  for (int trial = 0; trial < 20; ++trial) {
    ChunkHasher hasher;
    for (size_t offset = 0; offset < bytes.size();) {
      const size_t part = std::min<size_t>(1 + random() % 600'000, bytes.size() - offset);
      hasher.Add(bytes.data() + offset, part);
      offset += part;
    }
    EXPECT_EQ(hasher.Finish(), leaves);
    EXPECT_TRUE(hasher.Finish().empty());  // the first Finish has reset the hasher
  }
}

TEST(Checksum, PieceDigestDoesNotDependOnChunkSize) {
  std::string bytes(5 * kLeafBytes + 1, 'q');
  bytes[4'000'000] = 'r';
  std::vector<Digest128> digests;
  for (size_t chunk_bytes : {kLeafBytes, 2 * kLeafBytes, 4 * kLeafBytes}) {
    PieceDigest piece;
    for (size_t offset = 0; offset < bytes.size(); offset += chunk_bytes) {
      const size_t size = std::min(chunk_bytes, bytes.size() - offset);
      piece.AddLeaves(LeafHashes(absl::MakeConstSpan(bytes.data() + offset, size)));
    }
    digests.push_back(piece.Finish());
  }
  EXPECT_EQ(digests[0], digests[1]);
  EXPECT_EQ(digests[0], digests[2]);
}

TEST(Status, EveryCodeAndItsDetailSurviveTheRoundTrip) {
  for (int code = 1; code <= 16; ++code) {  // every code of gRPC and absl but OK
    v1::ErrorDetail detail;
    detail.set_reason(v1::ErrorDetail::CONFLICT);
    detail.set_tensor("wte.weight");
    detail.set_version(42);
    const absl::Status status =
        MakeError(static_cast<absl::StatusCode>(code), "same key, other bytes", detail);
    const absl::Status back = FromGrpc(ToGrpc(status));
    EXPECT_EQ(back.code(), status.code());
    EXPECT_EQ(back.message(), status.message());
    EXPECT_EQ(DetailOf(back).SerializeAsString(), detail.SerializeAsString());
  }
  EXPECT_TRUE(FromGrpc(ToGrpc(absl::OkStatus())).ok());
}

TEST(Status, AnnotatedKeepsTheDetailAndAddsToIt) {
  v1::ErrorDetail more;
  more.set_server("b:7070");
  const absl::Status status = Annotated(
      MakeError(absl::StatusCode::kAborted, "chunk", v1::ErrorDetail::CHECKSUM), "push", more);
  EXPECT_EQ(status.message(), "push: chunk");
  EXPECT_EQ(DetailOf(status).reason(), v1::ErrorDetail::CHECKSUM);
  EXPECT_EQ(DetailOf(status).server(), "b:7070");
}

TEST(DType, EveryValueHasASizeAndAName) {
  for (int value = v1::DType_MIN + 1; value <= v1::DType_MAX; ++value) {
    EXPECT_GT(PieceBytes(static_cast<v1::DType>(value), 1), 0u) << value;
    EXPECT_NE(DTypeName(static_cast<v1::DType>(value)), "unspecified") << value;
  }
  EXPECT_EQ(ElementBytes(v1::DTYPE_UNSPECIFIED), 0u);
  EXPECT_EQ(PieceBytes(v1::DTYPE_BF16, 300), 600u);
  // One byte per element, and an fp32 scale for each block of 256 elements.
  EXPECT_EQ(PieceBytes(v1::DTYPE_I8_BLOCK, 256), 260u);
  EXPECT_EQ(PieceBytes(v1::DTYPE_I8_BLOCK, 257), 265u);
}

}  // namespace
}  // namespace orlop
