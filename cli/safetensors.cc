#include "cli/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "orlop/v1/types.pb.h"
#include "proto/dtype.h"

namespace orlop::cli {
namespace {

using nlohmann::ordered_json;

constexpr std::pair<v1::DType, const char*> kNames[] = {
    {v1::DTYPE_F64, "F64"},   {v1::DTYPE_F32, "F32"}, {v1::DTYPE_F16, "F16"},
    {v1::DTYPE_BF16, "BF16"}, {v1::DTYPE_I64, "I64"}, {v1::DTYPE_I32, "I32"},
    {v1::DTYPE_I16, "I16"},   {v1::DTYPE_I8, "I8"},   {v1::DTYPE_U8, "U8"},
    {v1::DTYPE_BOOL, "BOOL"}};

std::string NameOf(v1::DType dtype) {
  for (const auto& [type, name] : kNames)
    if (type == dtype) return name;
  return "";
}

v1::DType TypeOf(std::string_view name) {
  for (const auto& [type, known] : kNames)
    if (known == name) return type;
  return v1::DTYPE_UNSPECIFIED;
}

absl::Status FileError(std::string_view what, const std::string& path) {
  const int error = errno;
  return absl::Status(absl::ErrnoToStatusCode(error),
                      absl::StrCat(std::string(what), " ", path, ": ", std::strerror(error)));
}

absl::Status Malformed(const std::string& path, const std::string& fault) {
  return absl::InvalidArgumentError(absl::StrCat(path, " is not a safetensors file: ", fault));
}

// Builds the JSON header, assigns every entry its offset, and sets *data_bytes to the total data
// size.
std::string Header(std::vector<SafetensorsEntry>* entries,
                   const std::map<std::string, std::string>& metadata, uint64_t* data_bytes) {
  ordered_json header = ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  *data_bytes = 0;
  for (SafetensorsEntry& entry : *entries) {
    entry.begin = *data_bytes;
    uint64_t bytes = ElementBytes(entry.dtype);
    for (uint64_t dimension : entry.shape) bytes *= dimension;
    entry.end = *data_bytes += bytes;
    header[entry.name] = {{"dtype", NameOf(entry.dtype)},
                          {"shape", entry.shape},
                          {"data_offsets", {entry.begin, entry.end}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return text;
}

absl::Status WriteAll(int file, absl::Span<const char> bytes, const std::string& path) {
  while (!bytes.empty()) {
    const ssize_t written = write(file, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return FileError("cannot write", path);
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  return absl::OkStatus();
}

absl::Status ReadAll(int file, uint64_t offset, absl::Span<char> bytes, const std::string& path) {
  while (!bytes.empty()) {
    const ssize_t got = pread(file, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return FileError("cannot read", path);
    if (got == 0) return Malformed(path, "it ends too early");
    bytes.remove_prefix(static_cast<size_t>(got));
    offset += static_cast<uint64_t>(got);
  }
  return absl::OkStatus();
}

// Parses one tensor of the header. `data_bytes` is the size of the data part of the file.
absl::StatusOr<SafetensorsEntry> ParseEntry(const std::string& name, const ordered_json& json,
                                            uint64_t data_bytes) {
  const auto is_counts = [](const ordered_json& list) {
    return list.is_array() && std::all_of(list.begin(), list.end(),
                                          [](const auto& n) { return n.is_number_unsigned(); });
  };
  if (!json.is_object() || !json.contains("dtype") || !json["dtype"].is_string() ||
      !json.contains("shape") || !is_counts(json["shape"]) || !json.contains("data_offsets") ||
      !is_counts(json["data_offsets"]) || json["data_offsets"].size() != 2)
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", name, " lacks dtype, shape or data_offsets"));
  SafetensorsEntry entry{
      name, TypeOf(json["dtype"].get<std::string>()), json["shape"].get<std::vector<uint64_t>>(),
      json["data_offsets"][0].get<uint64_t>(), json["data_offsets"][1].get<uint64_t>()};
  if (entry.dtype == v1::DTYPE_UNSPECIFIED)
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", name, " has dtype ", json["dtype"].dump()));
  const absl::StatusOr<uint64_t> count = ElementCount(entry.shape);
  if (!count.ok())
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", name, ": ", count.status().message()));
  if (entry.begin > entry.end || entry.end > data_bytes ||
      entry.end - entry.begin != *count * ElementBytes(entry.dtype))
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", name, " has data_offsets [", entry.begin, ", ", entry.end, "]; expected ",
        *count * ElementBytes(entry.dtype), " of ", data_bytes, " bytes"));
  return entry;
}

}  // namespace

absl::StatusOr<SafetensorsWriter> SafetensorsWriter::Open(
    std::string path, std::vector<SafetensorsEntry> entries,
    const std::map<std::string, std::string>& metadata) {
  std::set<std::string> names;
  for (const SafetensorsEntry& entry : entries)
    if (NameOf(entry.dtype).empty() || !names.insert(entry.name).second)
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", entry.name, " is listed twice or has no dtype"));
  uint64_t data_bytes = 0;
  const std::string header = Header(&entries, metadata, &data_bytes);
  std::string temporary = absl::StrCat(path, ".", getpid(), ".partial");
  const int file = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (file < 0) return FileError("cannot create", temporary);
  SafetensorsWriter writer(std::move(path), std::move(temporary), file, data_bytes);
  const uint64_t size = header.size();
  char prefix[8];
  for (int i = 0; i < 8; ++i) prefix[i] = static_cast<char>(size >> (8 * i));
  absl::Status status = WriteAll(file, prefix, writer.temporary_);
  if (status.ok()) status = WriteAll(file, header, writer.temporary_);
  if (!status.ok()) return status;
  return writer;
}

SafetensorsWriter::SafetensorsWriter(std::string path, std::string temporary, int file,
                                     uint64_t data_bytes)
    : path_(std::move(path)),
      temporary_(std::move(temporary)),
      file_(file),
      left_bytes_(data_bytes) {}

SafetensorsWriter::SafetensorsWriter(SafetensorsWriter&& other) noexcept
    : path_(std::move(other.path_)),
      temporary_(std::move(other.temporary_)),
      file_(std::exchange(other.file_, -1)),
      left_bytes_(other.left_bytes_) {}

SafetensorsWriter::~SafetensorsWriter() {
  if (file_ < 0) return;
  close(file_);
  unlink(temporary_.c_str());
}

absl::Status SafetensorsWriter::Write(absl::Span<const char> bytes) {
  if (bytes.size() > left_bytes_)
    return absl::FailedPreconditionError(
        absl::StrCat(path_, ": ", bytes.size() - left_bytes_, " bytes too many"));
  left_bytes_ -= bytes.size();
  return WriteAll(file_, bytes, temporary_);
}

absl::Status SafetensorsWriter::Close() {
  if (left_bytes_ != 0)
    return absl::FailedPreconditionError(
        absl::StrCat(path_, ": ", left_bytes_, " bytes are missing"));
  if (fsync(file_) != 0) return FileError("cannot sync", temporary_);
  if (rename(temporary_.c_str(), path_.c_str()) != 0) return FileError("cannot rename to", path_);
  close(std::exchange(file_, -1));
  return absl::OkStatus();
}

absl::StatusOr<SafetensorsReader> SafetensorsReader::Open(std::string path) {
  SafetensorsReader reader(std::move(path));
  reader.file_ = open(reader.path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (reader.file_ < 0) return FileError("cannot open", reader.path_);
  if (absl::Status status = reader.ReadHeader(); !status.ok()) return status;
  return reader;
}

SafetensorsReader::SafetensorsReader(SafetensorsReader&& other) noexcept
    : path_(std::move(other.path_)),
      file_(std::exchange(other.file_, -1)),
      data_start_(other.data_start_),
      entries_(std::move(other.entries_)) {}

SafetensorsReader::~SafetensorsReader() {
  if (file_ >= 0) close(file_);
}

absl::Status SafetensorsReader::ReadHeader() {
  struct stat facts;
  if (fstat(file_, &facts) != 0) return FileError("cannot read", path_);
  const uint64_t file_bytes = static_cast<uint64_t>(facts.st_size);
  unsigned char prefix[8];
  if (file_bytes < sizeof prefix) return Malformed(path_, "it is shorter than 8 bytes");
  if (absl::Status status = ReadAll(file_, 0, {reinterpret_cast<char*>(prefix), 8}, path_);
      !status.ok())
    return status;
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | prefix[i];
  if (header_bytes > kMaxHeaderBytes || header_bytes > file_bytes - 8)
    return Malformed(path_, absl::StrCat("its header would have ", header_bytes, " bytes"));
  std::string text(header_bytes, '\0');
  if (absl::Status status = ReadAll(file_, 8, absl::MakeSpan(text), path_); !status.ok())
    return status;
  data_start_ = 8 + header_bytes;
  const ordered_json header = ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!header.is_object()) return Malformed(path_, "its header is not a JSON object");
  for (const auto& [name, json] : header.items()) {
    if (name == "__metadata__") continue;
    absl::StatusOr<SafetensorsEntry> entry = ParseEntry(name, json, file_bytes - data_start_);
    if (!entry.ok()) return Malformed(path_, std::string(entry.status().message()));
    entries_.push_back(*std::move(entry));
  }
  std::sort(entries_.begin(), entries_.end(),
            [](const auto& a, const auto& b) { return a.begin < b.begin; });
  return absl::OkStatus();
}

absl::Status SafetensorsReader::Read(const SafetensorsEntry& entry, uint64_t offset,
                                     absl::Span<char> bytes) const {
  if (offset > entry.end - entry.begin || bytes.size() > entry.end - entry.begin - offset)
    return absl::OutOfRangeError(
        absl::StrCat("tensor ", entry.name, ": ", bytes.size(), " bytes at ", offset));
  return ReadAll(file_, data_start_ + entry.begin + offset, bytes, path_);
}

}  // namespace orlop::cli
