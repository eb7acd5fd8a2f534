// Descriptions of tensors and shards, for the admin and the peer service.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "orlop/v1/admin.pb.h"
#include "server/runtime/job_table.h"

namespace orlop::server {

// Returns a tensor's entry of ListTensors. `optimizers`: model.Optimizers(); `tensor`: index in the
// manifest.
v1::TensorSummary Summary(JobRuntime* job, const JobModel& model,
                          const std::vector<TensorOptimizer>& optimizers, uint32_t tensor);

// Describes the shards of a tensor that are on this server and whose number among the tensor's
// shards is one of the kMaxShardsPerPage from request.first_shard on.
//   Status  NotFound (UNKNOWN_JOB, UNKNOWN_TENSOR), Unavailable (STOPPING)
absl::StatusOr<v1::DescribeTensorResponse> DescribeHere(const JobTable& jobs,
                                                        const v1::DescribeTensorRequest& request);

}  // namespace orlop::server
