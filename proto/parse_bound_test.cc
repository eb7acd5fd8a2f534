#include "proto/parse_bound.h"

#include <google/protobuf/message.h>

#include <cstdint>
#include <random>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"

namespace orlop {
namespace {

absl::Span<const uint8_t> Bytes(const std::string& text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

// Expects the bound of a message's bytes to be at least what the parsed message takes, and at most
// `most` times that.
template <typename Message>
void ExpectBound(const std::string& bytes, double most) {
  Message parsed;
  ASSERT_TRUE(parsed.ParseFromString(bytes));
  const absl::StatusOr<uint64_t> bound = ParseBound(Message::default_instance()).Of(Bytes(bytes));
  ASSERT_TRUE(bound.ok()) << bound.status();
  EXPECT_GE(*bound, parsed.SpaceUsedLong());
  EXPECT_LE(static_cast<double>(*bound), most * static_cast<double>(parsed.SpaceUsedLong()));
}

TEST(ParseBound, EmptyEntriesCountAsObjects) {
  v1::CreateJobRequest request;
  for (int i = 0; i < 100'000; ++i) request.add_tensors();
  ExpectBound<v1::CreateJobRequest>(request.SerializeAsString(), 2);
}

TEST(ParseBound, ManifestsLayoutsAndCommits) {
  v1::CreateJobRequest manifest;
  for (int i = 0; i < 1000; ++i) {
    v1::TensorSpec* tensor = manifest.add_tensors();
    tensor->set_name("layers." + std::to_string(i) + ".attention.query.weight");
    tensor->add_shape(4096);
    tensor->add_shape(4096);
    if (i % 3 == 0) tensor->add_tied_names("tied." + std::to_string(i));
  }
  ExpectBound<v1::CreateJobRequest>(manifest.SerializeAsString(), 3);
  v1::JoinRequest join;
  for (int i = 0; i < 1000; ++i) {
    v1::Box* box = join.mutable_layout()->add_tensors()->add_boxes();
    box->add_offset(i);
    box->add_extent(1);
  }
  ExpectBound<v1::JoinRequest>(join.SerializeAsString(), 4);
  v1::CommitStepRequest commit;
  for (int i = 0; i < 1000; ++i) {
    commit.add_absent_tensors(i);
    (*commit.add_groups()->mutable_values())["lr"] = i;
  }
  ExpectBound<v1::CommitStepRequest>(commit.SerializeAsString(), 4);
}

TEST(ParseBound, UnknownFieldsCount) {
  std::string bytes;
  for (int i = 0; i < 10'000; ++i) bytes += "\xf8\x3f\x01";  // field 1023, varint 1
  ExpectBound<v1::CreateJobRequest>(bytes, 12);
  bytes.clear();
  for (int i = 0; i < 10'000; ++i) bytes += std::string("\xfa\x3f\x00", 3);  // field 1023, empty
  ExpectBound<v1::CreateJobRequest>(bytes, 8);
}

// The parser keeps a field whose wire type is not the one of its type as an unknown field.
TEST(ParseBound, KnownFieldsOfAnotherWireTypeCountAsUnknown) {
  std::string bytes;
  for (int i = 0; i < 10'000; ++i) bytes += "\x25\x01\x01\x01\x01";  // Chunk.checksum, 4 bytes
  ExpectBound<v1::Chunk>(bytes, 8);
  bytes.clear();
  for (int i = 0; i < 10'000; ++i) bytes += "\x20\x01";  // Chunk.checksum, a varint
  ExpectBound<v1::Chunk>(bytes, 8);
  bytes.clear();
  for (int i = 0; i < 10'000; ++i) bytes += "\x0d\x01\x01\x01\x01";  // Box.offset, 4 bytes
  ExpectBound<v1::Box>(bytes, 8);
}

TEST(ParseBound, WhatIsNoProtobufIsRefused) {
  const ParseBound bound(v1::CreateJobRequest::default_instance());
  for (const std::string& bytes :
       {std::string("\x00", 1), std::string("\x0a\x05"), std::string("\x0b"), std::string("\xff"),
        std::string("\x09\x01"), std::string("\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")})
    EXPECT_FALSE(bound.Of(Bytes(bytes)).ok());
  EXPECT_TRUE(bound.Of({}).ok());
}

TEST(ParseBound, RandomBytesNeverTakeMoreThanTheirBound) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const ParseBound bound(v1::StepMessage::default_instance());
  int parsed_count = 0;
  for (int i = 0; i < 200'000; ++i) {
    std::string bytes(random() % 24, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random() % 4 == 0 ? random() : random() % 16);
    v1::StepMessage parsed;
    const absl::StatusOr<uint64_t> most = bound.Of(Bytes(bytes));
    if (!most.ok() || !parsed.ParseFromString(bytes)) continue;
    ++parsed_count;
    ASSERT_GE(*most, parsed.SpaceUsedLong()) << parsed.DebugString();
  }
  EXPECT_GT(parsed_count, 1000);
}

}  // namespace
}  // namespace orlop
