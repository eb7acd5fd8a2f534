// Errors across the wire: absl::Status with a v1::ErrorDetail as payload <-> grpc::Status with the
// detail in its details. Programs branch on code and detail, never on the message.
#pragma once

#include <grpcpp/support/status.h>

#include <string_view>

#include "absl/status/status.h"
#include "orlop/v1/types.pb.h"

namespace orlop {

// A status of this code whose message and detail travel together. `code` must not be OK.
absl::Status MakeError(absl::StatusCode code, std::string_view message,
                       const v1::ErrorDetail& detail);
// The same with the reason alone.
absl::Status MakeError(absl::StatusCode code, std::string_view message,
                       v1::ErrorDetail::Reason reason);

// The detail of an error; an empty one if it has none.
v1::ErrorDetail DetailOf(const absl::Status& status);

// The same error with further detail fields merged in (fields set in `more` win) and `context: `
// before its message.
absl::Status Annotated(const absl::Status& status, std::string_view context,
                       const v1::ErrorDetail& more = {});

grpc::Status ToGrpc(const absl::Status& status);
absl::Status FromGrpc(const grpc::Status& status);

}  // namespace orlop
