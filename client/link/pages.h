// Lists longer than one message: cut into pages on the way out, put together on the way in.
#pragma once

#include <string_view>
#include <vector>

#include "client/link/link.h"
#include "client/link/manifest.h"
#include "orlop/v1/job.grpc.pb.h"

namespace orlop::client {

// CreateJob requests that together carry the spec; all but the last have `more`. At least one.
std::vector<v1::CreateJobRequest> CreatePages(const JobSpec& spec);
// Join requests that together carry the layout.
std::vector<v1::JoinRequest> JoinPages(const v1::JoinRequest& base,
                                       const v1::ContributionLayout& layout);
// The whole manifest of a job. NotFound names the job.
absl::StatusOr<Manifest> ReadManifest(Link* link, std::string_view job);

}  // namespace orlop::client
