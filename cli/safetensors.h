// Files in the safetensors format (https://github.com/huggingface/safetensors, "Format"):
//
//   8 bytes: N, little endian
//   N bytes: JSON header, padded with blanks to a multiple of 8
//   data
//
//   header = {"__metadata__": {"key": "value"},
//             "NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
//
// Offsets count from the start of the data; tensors follow one another without gaps.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "orlop/v1/types.pb.h"

namespace orlop::cli {

struct SafetensorsEntry {
  std::string name;
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  std::vector<uint64_t> shape;
  uint64_t begin = 0;  // bytes from the start of the data
  uint64_t end = 0;
};

// Writes a file in one pass under a temporary name in the same directory. Close renames it, so that
// a reader sees the whole file or none. Not thread-safe.
class SafetensorsWriter {
 public:
  // Sets the offsets of `entries`. Status: InvalidArgument, or an error of the file system with its
  // path.
  static absl::StatusOr<SafetensorsWriter> Open(std::string path,
                                                std::vector<SafetensorsEntry> entries,
                                                const std::map<std::string, std::string>& metadata);
  SafetensorsWriter(SafetensorsWriter&& other) noexcept;
  SafetensorsWriter& operator=(SafetensorsWriter&&) = delete;
  ~SafetensorsWriter();  // removes the temporary file, unless it was closed

  // Appends data in the order of the entries.
  absl::Status Write(absl::Span<const char> bytes);
  // Syncs and renames. Status: FailedPrecondition unless exactly the announced bytes were written.
  absl::Status Close();

 private:
  SafetensorsWriter(std::string path, std::string temporary, int file, uint64_t data_bytes);
  std::string path_, temporary_;
  int file_ = -1;
  uint64_t left_bytes_ = 0;
};

// Reads a file and checks its header: known dtypes, offsets inside the file that match shape and
// dtype. Threads: any may read.
class SafetensorsReader {
 public:
  static constexpr uint64_t kMaxHeaderBytes = 100 << 20;  // limit of the reference implementation

  // Status: NotFound, or InvalidArgument naming path and tensor.
  static absl::StatusOr<SafetensorsReader> Open(std::string path);
  SafetensorsReader(SafetensorsReader&& other) noexcept;
  SafetensorsReader& operator=(SafetensorsReader&&) = delete;
  ~SafetensorsReader();

  // In the order of their data.
  const std::vector<SafetensorsEntry>& entries() const { return entries_; }
  // Reads the bytes of a tensor from `offset` on. `offset` + bytes.size() must not exceed its size.
  absl::Status Read(const SafetensorsEntry& entry, uint64_t offset, absl::Span<char> bytes) const;

 private:
  explicit SafetensorsReader(std::string path) : path_(std::move(path)) {}
  absl::Status ReadHeader();
  std::string path_;
  int file_ = -1;
  uint64_t data_start_ = 0;
  std::vector<SafetensorsEntry> entries_;
};

}  // namespace orlop::cli
