// Lists longer than one message: they are sent in pages, and pages received are joined.
#pragma once

#include <string_view>
#include <vector>

#include "client/link/link.h"
#include "client/link/manifest.h"
#include "orlop/v1/job.grpc.pb.h"

namespace orlop::client {

// Returns the CreateJob requests that together carry the spec, at least one. All but the last have
// `more` set.
std::vector<v1::CreateJobRequest> CreatePages(const JobSpec& spec);
// Returns the Join requests that together carry the layout.
std::vector<v1::JoinRequest> JoinPages(const v1::JoinRequest& base,
                                       const v1::ContributionLayout& layout);
// Reads the whole manifest of a job. Status: NotFound, naming the job.
absl::StatusOr<Manifest> ReadManifest(Link* link, std::string_view job);

}  // namespace orlop::client
