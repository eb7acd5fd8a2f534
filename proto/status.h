// Converts errors for the wire: an absl::Status with a v1::ErrorDetail as its payload becomes a
// grpc::Status with the detail in error_details, and back. Programs branch on code and detail,
// never on the message.
#pragma once

#include <grpcpp/support/status.h>

#include <cstddef>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "orlop/v1/types.pb.h"

namespace orlop {

// Returns a status with a code, a message and a detail. `code` must not be OK.
absl::Status MakeError(absl::StatusCode code, std::string_view message,
                       const v1::ErrorDetail& detail);
// Like above, with a detail that has only a reason.
absl::Status MakeError(absl::StatusCode code, std::string_view message,
                       v1::ErrorDetail::Reason reason);

// Returns the detail of an error, or an empty one if it has none.
v1::ErrorDetail DetailOf(const absl::Status& status);

// Returns the same error with `context: ` before its message and the fields of `more` merged into
// its detail; fields set in `more` win.
absl::Status Annotated(const absl::Status& status, std::string_view context,
                       const v1::ErrorDetail& more = {});

// Returns the beginning of a text in UTF-8 that someone has sent: at most `bytes`, cut between two
// characters.
std::string Beginning(std::string_view text, size_t bytes);

// Returns the error for the wire. Of a message it keeps the first kMaxErrorMessageBytes, of each
// text of the detail the first kMaxNameBytes: gRPC drops an error whose trailers are too long.
grpc::Status ToGrpc(const absl::Status& status);
absl::Status FromGrpc(const grpc::Status& status);

}  // namespace orlop
