#include "cli/safetensors.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <ios>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "orlop/v1/types.pb.h"

namespace orlop::cli {
namespace {

class Safetensors : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "/safetensorsXXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
    path_ = directory_ + "/model.safetensors";
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }
  std::string Bytes() const {
    std::ifstream in(path_, std::ios::binary);
    std::ostringstream text;
    text << in.rdbuf();
    return text.str();
  }
  void Put(const std::string& header, const std::string& data) {
    std::ofstream out(path_, std::ios::binary);
    const uint64_t size = header.size();
    out.write(reinterpret_cast<const char*>(&size), 8);
    out << header << data;
  }
  std::string directory_, path_;
};

TEST_F(Safetensors, WritesTheBytesOfTheFormat) {
  auto writer = SafetensorsWriter::Open(
      path_, {{"w", v1::DTYPE_BF16, {2, 1}}, {"n", v1::DTYPE_I64, {}}}, {{"step", "3"}});
  ASSERT_TRUE(writer.ok()) << writer.status();
  ASSERT_TRUE(writer->Write({"abcd", 4}).ok());
  ASSERT_TRUE(writer->Write({"12345678", 8}).ok());
  EXPECT_FALSE(
      std::filesystem::exists(path_));  // the name does not exist before the file is complete
  ASSERT_TRUE(writer->Close().ok());
  std::string header =
      R"({"__metadata__":{"step":"3"},"w":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},)"
      R"("n":{"dtype":"I64","shape":[],"data_offsets":[4,12]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  EXPECT_EQ(Bytes(), std::string(1, static_cast<char>(header.size())) + std::string(7, '\0') +
                         header + "abcd12345678");
}

TEST_F(Safetensors, ReadsBackWhatWasWritten) {
  auto writer =
      SafetensorsWriter::Open(path_, {{"a", v1::DTYPE_U8, {3}}, {"b", v1::DTYPE_F32, {1, 2}}}, {});
  ASSERT_TRUE(writer.ok());
  ASSERT_TRUE(writer->Write({"xyzABCDEFGH", 11}).ok());
  ASSERT_TRUE(writer->Close().ok());
  auto reader = SafetensorsReader::Open(path_);
  ASSERT_TRUE(reader.ok()) << reader.status();
  ASSERT_EQ(reader->entries().size(), 2u);
  const SafetensorsEntry& b = reader->entries()[1];
  EXPECT_EQ(b.name, "b");
  EXPECT_EQ(b.dtype, v1::DTYPE_F32);
  EXPECT_EQ(b.shape, (std::vector<uint64_t>{1, 2}));
  std::string bytes(4, '\0');
  ASSERT_TRUE(reader->Read(b, 4, absl::MakeSpan(bytes)).ok());
  EXPECT_EQ(bytes, "EFGH");
  EXPECT_EQ(reader->Read(b, 5, absl::MakeSpan(bytes)).code(), absl::StatusCode::kOutOfRange);
}

TEST_F(Safetensors, LeavesNothingBehindWhenNotClosed) {
  {
    auto writer = SafetensorsWriter::Open(path_, {{"a", v1::DTYPE_U8, {3}}}, {});
    ASSERT_TRUE(writer.ok());
    ASSERT_TRUE(writer->Write({"xy", 2}).ok());
    EXPECT_EQ(writer->Close().code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ(writer->Write({"zz", 2}).code(), absl::StatusCode::kFailedPrecondition);
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory_));
}

TEST_F(Safetensors, RefusesMalformedFilesNamingTheTensor) {
  const std::pair<const char*, const char*> headers[] = {
      {R"({"w":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}})", "w has dtype"},
      {R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", "w has data_offsets"},
      {R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", "w has data_offsets"},
      {R"({"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", "w lacks"},
      {R"({"w":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,0]}})",
       "w: shape"},
      {R"({"w":[]})", "w lacks"},
      {R"([1])", "not a JSON object"},
      {R"({"w":)", "not a JSON object"}};
  for (const auto& [header, fault] : headers) {
    Put(header, "1234");
    const auto reader = SafetensorsReader::Open(path_);
    ASSERT_EQ(reader.status().code(), absl::StatusCode::kInvalidArgument) << header;
    EXPECT_NE(std::string(reader.status().message()).find(fault), std::string::npos)
        << reader.status();
  }
  std::ofstream(path_, std::ios::binary) << "\xff\xff\xff\xff\xff\xff\xff\xff{}";
  EXPECT_EQ(SafetensorsReader::Open(path_).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(SafetensorsReader::Open(directory_ + "/none").status().code(),
            absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace orlop::cli
