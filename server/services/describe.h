// What can be seen of tensors and shards.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "orlop/v1/admin.pb.h"
#include "server/runtime/job_table.h"

namespace orlop::server {

// One tensor as a list shows it. `optimizers` is model.Optimizers().
v1::TensorSummary Summary(JobRuntime* job, const JobModel& model,
                          const std::vector<TensorOptimizer>& optimizers, uint32_t tensor);

// The shards of a tensor that are on this server, at most kMaxShardsPerPage from
// request.first_shard on.
//   Status  NotFound (UNKNOWN_JOB, UNKNOWN_TENSOR).
absl::StatusOr<v1::DescribeTensorResponse> DescribeHere(const JobTable& jobs,
                                                        const v1::DescribeTensorRequest& request);

}  // namespace orlop::server
