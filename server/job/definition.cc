#include "server/job/definition.h"

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/checksum.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/peer.pb.h"
#include "proto/convert.h"
#include "server/job/job_model.h"
#include "server/job/manifest.h"
#include "server/job/optimizer_config.h"

namespace orlop::server {
namespace {

absl::Status CheckManifest(const v1::JobDefinition& definition) {
  const v1::CreateJobRequest& manifest = definition.manifest();
  if (absl::Status status = ValidateName("job", manifest.job()); !status.ok()) return status;
  v1::CreateJobRequest complete = manifest;
  if (absl::Status status = CompleteManifest(&complete); !status.ok()) return status;
  const Digest128 digest = ManifestDigest(manifest);
  // The model is made of `manifest` itself, so what CompleteManifest would set must be there.
  if (digest != ManifestDigest(complete))
    return absl::InvalidArgumentError(
        absl::StrCat("the manifest of job '", manifest.job(), "' is not complete"));
  if (digest == FromWire(definition.manifest_digest())) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("the manifest of job '", manifest.job(),
                                                 "' has digest ", ToString(digest), ", not ",
                                                 ToString(FromWire(definition.manifest_digest()))));
}

}  // namespace

absl::StatusOr<std::shared_ptr<const JobModel>> CheckDefinition(
    const v1::JobDefinition& definition) {
  if (absl::Status status = CheckManifest(definition); !status.ok()) return status;
  if (definition.runs_size() == 0)
    return absl::InvalidArgumentError(
        absl::StrCat("job '", definition.manifest().job(), "' is not placed on any server"));
  absl::StatusOr<std::shared_ptr<const JobModel>> model = JobModel::Make(definition);
  if (!model.ok() || !definition.has_optimizer()) return model;
  if (absl::Status status = ValidateOptimizer(**model, definition.optimizer()); !status.ok())
    return status;
  return model;
}

}  // namespace orlop::server
