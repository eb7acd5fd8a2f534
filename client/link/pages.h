// Manifests and contribution layouts that are longer than one message. A request is split into
// pages of at most kMaxControlMessageBytes (proto/limits.h), and the pages of an answer are joined.
//   Threads  All functions are safe from any thread. Only ReadManifest makes calls.
#pragma once

#include <string_view>
#include <vector>

#include "client/link/link.h"
#include "client/link/manifest.h"
#include "orlop/v1/job.grpc.pb.h"

namespace orlop::client {

// Returns the CreateJob requests that together carry `spec`. There is at least one; all but the
// last have `more` set. The caller sends them in this order.
std::vector<v1::CreateJobRequest> CreatePages(const JobSpec& spec);
// Returns the Join requests that together carry `layout`. Each has the fields of `base`, whose own
// layout is ignored. There is at least one; all but the last have `layout.more` set. The caller
// sends them in this order.
std::vector<v1::JoinRequest> JoinPages(const v1::JoinRequest& base,
                                       const v1::ContributionLayout& layout);
// Reads all pages of a job's manifest from the step leader, one call per page. Each call has the
// retries and the timeout of Link::Call.
//   Status  NotFound, naming the job. The other errors of Link::Call and Manifest::Build.
absl::StatusOr<Manifest> ReadManifest(Link* link, std::string_view job);

}  // namespace orlop::client
