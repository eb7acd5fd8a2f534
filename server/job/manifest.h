// Checks of the manifest with which a client creates a job.
//   Threads  The functions are pure and safe from any thread.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "base/box.h"
#include "base/checksum.h"
#include "orlop/v1/job.pb.h"

namespace orlop::server {

// Returns InvalidArgument with `message` and an ErrorDetail (BAD_REQUEST) that has the field, its
// actual value and its limit.
absl::Status BadRequest(absl::string_view field, absl::string_view actual, absl::string_view limit,
                        const std::string& message);

// Checks a name: it has 1 to kMaxNameBytes characters of [A-Za-z0-9._/-] and no "..". `what` is the
// kind of name ("tensor name"), for the error.
//   Status  InvalidArgument (BAD_REQUEST).
absl::Status ValidateName(absl::string_view what, absl::string_view name);

// Checks one tensor by itself. JobModel::Make finds a name that two tensors have.
//   Status  InvalidArgument (BAD_REQUEST), naming tensor, field, value and limit.
absl::Status ValidateTensorSpec(const v1::TensorSpec& tensor);
// Returns the shape; empty: a scalar.
Shape ShapeOf(const v1::TensorSpec& tensor);

// Checks the options of a manifest whose pages were joined; JobModel::Make checks its tensors. Sets
// shard_elements and durability if the client has not, and clears the fields of paging.
//   Status  InvalidArgument (BAD_REQUEST): there is no tensor, or shard_elements is out of range.
//           Unimplemented: this build does not offer the durability level, which the message names.
absl::Status CompleteManifest(v1::CreateJobRequest* manifest);
// Returns the digest of a manifest that CompleteManifest has completed. It is the manifest's
// identity, the same on every server.
Digest128 ManifestDigest(const v1::CreateJobRequest& manifest);

}  // namespace orlop::server
