// Argument checks of the public kernels.
#pragma once
#include <cstddef>
#include <initializer_list>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace orlop::kernels {

struct NamedCount {
  absl::string_view name;
  size_t count;
};

// Status: InvalidArgument, naming the first span whose count is not `expected`, with both numbers.
inline absl::Status CheckCounts(size_t expected, std::initializer_list<NamedCount> spans) {
  for (const NamedCount& span : spans) {
    if (span.count != expected) {
      return absl::InvalidArgumentError(
          absl::StrCat(span.name, " has ", span.count, " elements, expected ", expected));
    }
  }
  return absl::OkStatus();
}

}  // namespace orlop::kernels
