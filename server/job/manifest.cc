#include "server/job/manifest.h"

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/box.h"
#include "base/checksum.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/status.h"

namespace orlop::server {

absl::Status BadRequest(absl::string_view field, absl::string_view actual, absl::string_view limit,
                        const std::string& message) {
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::BAD_REQUEST);
  detail.set_field(std::string(field));
  detail.set_actual(std::string(actual));
  detail.set_limit(std::string(limit));
  return MakeError(absl::StatusCode::kInvalidArgument, message, detail);
}

Shape ShapeOf(const v1::TensorSpec& tensor) {
  return {tensor.shape().begin(), tensor.shape().end()};
}

absl::Status ValidateName(absl::string_view what, absl::string_view name) {
  // A refused name may have any length, so the message has only its beginning.
  const std::string quoted =
      absl::StrCat(what, " '", Beginning({name.data(), name.size()}, 300), "'");
  if (name.empty() || name.size() > kMaxNameBytes) {
    return BadRequest(
        what, absl::StrCat(name.size(), " bytes"), absl::StrCat(kMaxNameBytes, " bytes"),
        absl::StrCat(quoted, " has ", name.size(), " bytes; a name has 1 to ", kMaxNameBytes));
  }
  for (char c : name) {
    if (!absl::ascii_isalnum(static_cast<unsigned char>(c)) &&
        !absl::StrContains("._/-", absl::string_view(&c, 1))) {
      return BadRequest(what, name, "[A-Za-z0-9._/-]",
                        absl::StrCat(quoted, " holds a character outside [A-Za-z0-9._/-]"));
    }
  }
  if (name.find("..") != absl::string_view::npos)
    return BadRequest(what, name, "no '..'", absl::StrCat(quoted, " contains '..'"));
  return absl::OkStatus();
}

absl::Status ValidateTensorSpec(const v1::TensorSpec& tensor) {
  if (absl::Status status = ValidateName("tensor name", tensor.name()); !status.ok()) return status;
  const std::string what = absl::StrCat("tensor '", tensor.name(), "'");
  if (tensor.tied_names_size() > static_cast<int>(kMaxTiedNames)) {
    return BadRequest("tied_names", absl::StrCat(tensor.tied_names_size()),
                      absl::StrCat(kMaxTiedNames),
                      absl::StrCat(what, " has ", tensor.tied_names_size(),
                                   " tied names; the limit is ", kMaxTiedNames));
  }
  for (const std::string& tied : tensor.tied_names()) {
    if (absl::Status status = ValidateName("tied name", tied); !status.ok()) return status;
  }
  if (tensor.value_digest().size() > kMaxValueDigestBytes) {
    return BadRequest("value_digest", absl::StrCat(tensor.value_digest().size(), " bytes"),
                      absl::StrCat(kMaxValueDigestBytes),
                      absl::StrCat(what, ": value_digest has ", tensor.value_digest().size(),
                                   " bytes; the limit is ", kMaxValueDigestBytes));
  }
  if (absl::StatusOr<uint64_t> count = ElementCount(ShapeOf(tensor)); !count.ok()) {
    return BadRequest("shape", absl::StrCat(tensor.shape_size(), " dimensions"), "",
                      absl::StrCat(what, ": ", count.status().message()));
  }
  if (ElementBytes(tensor.dtype()) == 0 ||
      (tensor.kind() == v1::TENSOR_KIND_PARAMETER && !IsFloat(tensor.dtype()))) {
    return BadRequest("dtype", absl::StrCat(tensor.dtype()), "float32, bfloat16 or float16",
                      absl::StrCat(what, " has dtype ", std::string(DTypeName(tensor.dtype())),
                                   "; a parameter is float32, bfloat16 or float16"));
  }
  if (tensor.kind() != v1::TENSOR_KIND_PARAMETER && tensor.kind() != v1::TENSOR_KIND_BUFFER) {
    return BadRequest("kind", absl::StrCat(tensor.kind()), "PARAMETER or BUFFER",
                      absl::StrCat(what, " has an unknown kind"));
  }
  return absl::OkStatus();
}

absl::Status CompleteManifest(v1::CreateJobRequest* manifest) {
  if (manifest->tensors_size() == 0)
    return BadRequest("tensors", "0", "1", "a job needs at least one tensor");
  if (manifest->shard_elements() == 0) manifest->set_shard_elements(kDefaultShardElements);
  const uint64_t elements = manifest->shard_elements();
  if (elements < kMinShardElements || elements > kMaxShardElements ||
      elements % kMinShardElements != 0) {
    return BadRequest("shard_elements", absl::StrCat(elements), absl::StrCat(kMaxShardElements),
                      absl::StrCat("shard_elements ", elements, " must be a multiple of ",
                                   kMinShardElements, " up to ", kMaxShardElements));
  }
  if (manifest->durability() == v1::DURABILITY_UNSPECIFIED)
    manifest->set_durability(v1::DURABILITY_MEMORY);
  if (manifest->durability() != v1::DURABILITY_MEMORY) {
    const std::string name = v1::Durability_Name(manifest->durability());
    v1::ErrorDetail detail;
    detail.set_reason(v1::ErrorDetail::BAD_REQUEST);
    detail.set_field("durability");
    detail.set_actual(name.empty() ? absl::StrCat(manifest->durability()) : name);
    detail.set_limit("DURABILITY_MEMORY");
    return MakeError(absl::StatusCode::kUnimplemented,
                     absl::StrCat("durability ", detail.actual(),
                                  " is not offered by this build; it offers DURABILITY_MEMORY"),
                     detail);
  }
  // The fields of a page are not part of the job, so they must not change its digest.
  manifest->set_more(false);
  manifest->set_first(0);
  return absl::OkStatus();
}

Digest128 ManifestDigest(const v1::CreateJobRequest& manifest) {
  // CreateJobRequest has no map field, so protobuf serializes it to the same bytes on every server.
  const std::string bytes = manifest.SerializeAsString();
  return Digest(bytes.data(), bytes.size());
}

}  // namespace orlop::server
