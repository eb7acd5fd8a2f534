#include "proto/status.h"

#include <cstddef>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"

namespace orlop {
namespace {

constexpr char kDetailUrl[] = "orlop.v1.ErrorDetail";

}  // namespace

absl::Status MakeError(absl::StatusCode code, std::string_view message,
                       const v1::ErrorDetail& detail) {
  absl::Status status(code, absl::string_view(message.data(), message.size()));
  status.SetPayload(kDetailUrl, absl::Cord(detail.SerializeAsString()));
  return status;
}

absl::Status MakeError(absl::StatusCode code, std::string_view message,
                       v1::ErrorDetail::Reason reason) {
  v1::ErrorDetail detail;
  detail.set_reason(reason);
  return MakeError(code, message, detail);
}

v1::ErrorDetail DetailOf(const absl::Status& status) {
  v1::ErrorDetail detail;
  if (auto payload = status.GetPayload(kDetailUrl)) detail.ParseFromString(std::string(*payload));
  return detail;
}

absl::Status Annotated(const absl::Status& status, std::string_view context,
                       const v1::ErrorDetail& more) {
  if (status.ok()) return status;
  v1::ErrorDetail detail = DetailOf(status);
  detail.MergeFrom(more);
  return MakeError(
      status.code(),
      absl::StrCat(absl::string_view(context.data(), context.size()), ": ", status.message()),
      detail);
}

std::string Beginning(std::string_view text, size_t bytes) {
  if (text.size() > bytes) {
    while (bytes > 0 && (static_cast<unsigned char>(text[bytes]) & 0xc0) == 0x80) --bytes;
    text = text.substr(0, bytes);
  }
  return std::string(text);
}

// absl and gRPC use the same numbers for codes (google.rpc.Code); a test holds this.
grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  v1::ErrorDetail detail = DetailOf(status);
  for (std::string* text :
       {detail.mutable_server(), detail.mutable_job(), detail.mutable_tensor(),
        detail.mutable_field(), detail.mutable_actual(), detail.mutable_limit()})
    *text = Beginning(*text, kMaxNameBytes);
  const absl::string_view message = status.message();
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()),
                      Beginning({message.data(), message.size()}, kMaxErrorMessageBytes),
                      detail.SerializeAsString());
}

absl::Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  v1::ErrorDetail detail;
  // A proxy's foreign detail parses to nothing useful; code and message remain.
  detail.ParseFromString(status.error_details());
  return MakeError(static_cast<absl::StatusCode>(status.error_code()), status.error_message(),
                   detail);
}

}  // namespace orlop
