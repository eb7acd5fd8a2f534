// Checks of what a client says about a job before the job exists. Pure; any thread.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "base/box.h"
#include "base/checksum.h"
#include "orlop/v1/job.pb.h"

namespace orlop::server {

// InvalidArgument (BAD_REQUEST) whose detail has the field, its value and its limit.
absl::Status BadRequest(absl::string_view field, absl::string_view actual, absl::string_view limit,
                        const std::string& message);

// A name has 1 to kMaxNameBytes characters of [A-Za-z0-9._/-] and no "..". `what` names the kind of
// name in the message.
//   Status  InvalidArgument.
absl::Status ValidateName(absl::string_view what, absl::string_view name);

// Checks one tensor by itself; JobModel::Make compares names with one another.
//   Status  InvalidArgument naming tensor, field, value and limit.
absl::Status ValidateTensorSpec(const v1::TensorSpec& tensor);
Shape ShapeOf(const v1::TensorSpec& tensor);

// Checks a manifest whose pages were joined, and sets shard_elements and durability where the
// client left them to the server.
//   Status  InvalidArgument; Unimplemented: a durability level that this build does not offer, by
//           name.
absl::Status CompleteManifest(v1::CreateJobRequest* manifest);
// The identity of a complete manifest, the same on every server.
Digest128 ManifestDigest(const v1::CreateJobRequest& manifest);

}  // namespace orlop::server
