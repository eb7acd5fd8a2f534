// Reads and writes files in the safetensors format (https://github.com/huggingface/safetensors,
// "Format"). Such a file has
//
//   8 bytes  N, the size of the header in bytes, an unsigned little-endian number
//   N bytes  the header, JSON, padded with blanks to a multiple of 8
//   rest     the data of the tensors
//
//   header = {"__metadata__": {"key": "value"},
//             "NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
//
// data_offsets are [begin, end) in bytes from the start of the data. Tensors follow one another
// without gaps. Elements are little endian and row-major.
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

// One tensor of a file.
struct SafetensorsEntry {
  std::string name;
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  // Empty for a scalar.
  std::vector<uint64_t> shape;
  // The tensor's bytes are [begin, end), counted from the start of the data.
  uint64_t begin = 0;
  uint64_t end = 0;
};

// Writes a file in one pass. The file has a temporary name in the same directory until Close
// renames it, so that a reader sees the whole file or none. Not thread-safe.
class SafetensorsWriter {
 public:
  // Creates the temporary file and writes the header. Ignores begin and end of `entries`: the data
  // will have the tensors in the order of `entries`.
  //   Status  InvalidArgument (a name is listed twice, or the format has no such dtype), or an
  //           error of the file system, which names the path
  static absl::StatusOr<SafetensorsWriter> Open(std::string path,
                                                std::vector<SafetensorsEntry> entries,
                                                const std::map<std::string, std::string>& metadata);
  SafetensorsWriter(SafetensorsWriter&& other) noexcept;
  SafetensorsWriter& operator=(SafetensorsWriter&&) = delete;
  ~SafetensorsWriter();  // removes the temporary file, unless Close has succeeded

  // Appends the next bytes of the data. A call may end in the middle of a tensor.
  //   Status  FailedPrecondition (the entries have fewer bytes), or an error of the file system
  absl::Status Write(absl::Span<const char> bytes);
  // Syncs the file and renames it to its path, which replaces a file that is there.
  //   Status  FailedPrecondition (bytes of the entries are missing), or an error of the file system
  absl::Status Close();

 private:
  SafetensorsWriter(std::string path, std::string temporary, int file, uint64_t data_bytes);
  std::string path_, temporary_;
  int file_ = -1;
  // Bytes of data that are still to be written.
  uint64_t left_bytes_ = 0;
};

// Reads a file whose header has been checked: every dtype is known, no shape has a zero, and the
// offsets of a tensor are inside the file and match its shape and dtype. Gaps and overlaps between
// tensors are not refused. Threads: any thread may call the const methods at the same time.
class SafetensorsReader {
 public:
  // The reference implementation refuses longer headers.
  static constexpr uint64_t kMaxHeaderBytes = 100 << 20;

  // Opens a file and checks its header.
  //   Status  NotFound (no such file), InvalidArgument (a malformed file; names path and tensor),
  //           or another error of the file system, which names the path
  static absl::StatusOr<SafetensorsReader> Open(std::string path);
  SafetensorsReader(SafetensorsReader&& other) noexcept;
  SafetensorsReader& operator=(SafetensorsReader&&) = delete;
  ~SafetensorsReader();

  // Returns the tensors in the order of their data.
  const std::vector<SafetensorsEntry>& entries() const { return entries_; }
  // Fills `bytes` with the bytes of a tensor from byte `offset` of the tensor on. `entry` must be
  // one of entries().
  //   Status  OutOfRange (the tensor ends before), InvalidArgument (the file was cut off
  //           meanwhile), or an error of the file system
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
