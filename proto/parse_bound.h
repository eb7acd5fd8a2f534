// How much memory a protobuf message takes once it is parsed. A message of a few MiB can become
// hundreds of MiB of objects: a list entry of two bytes on the wire is an object of a hundred. So a
// server counts before it parses.
#pragma once

#include <google/protobuf/message.h>

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace orlop {

class ParseBound {
 public:
  // For messages of the type of `prototype`, the default instance of a generated class.
  //   Cost  O(fields of all types that the type contains)
  explicit ParseBound(const google::protobuf::Message& prototype);
  ~ParseBound();
  ParseBound(ParseBound&&) noexcept;

  // Returns an upper bound of the bytes that the parsed message takes, its objects included.
  //   Status   InvalidArgument: the bytes are no protobuf, or nest deeper than kMaxParseDepth.
  //   Threads  any
  //   Cost     one pass over the bytes; it allocates nothing.
  absl::StatusOr<uint64_t> Of(absl::Span<const uint8_t> bytes) const;

 private:
  struct Type;
  const Type* Add(const google::protobuf::Message& prototype);

  std::map<const google::protobuf::Descriptor*, std::unique_ptr<Type>> types_;
  const Type* root_ = nullptr;
};

inline constexpr int kMaxParseDepth = 16;  // no message of Orlop nests deeper than 6

}  // namespace orlop
