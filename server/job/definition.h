// The check of a job's definition (v1::JobDefinition) that another server has sent or that the disk
// gave back.
//   Threads  The function is pure and safe from any thread.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "orlop/v1/peer.pb.h"
#include "server/job/job_model.h"

namespace orlop::server {

// Checks everything but server_count, and returns the model: the manifest is complete
// (CompleteManifest) and has the digest that the definition names, every shard is placed, and the
// optimizer configuration, if there is one, fits the manifest.
//   Status  InvalidArgument, or an error of CompleteManifest, JobModel::Make or ValidateOptimizer.
absl::StatusOr<std::shared_ptr<const JobModel>> CheckDefinition(
    const v1::JobDefinition& definition);

}  // namespace orlop::server
