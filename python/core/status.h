// absl::Status as Python exceptions: orlop.errors.from_status chooses the class from the code.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace orlop::python {

// Raises unless `status` is OK. Called with the GIL held.
void ThrowIfError(const absl::Status& status);

template <typename T>
T ValueOrThrow(absl::StatusOr<T> result) {
  ThrowIfError(result.status());
  return *std::move(result);
}

}  // namespace orlop::python
