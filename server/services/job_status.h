// Facts about a job that several services return: its status, whether its memory is lost, and where
// its shards are.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "orlop/v1/job.pb.h"
#include "server/runtime/job_table.h"

namespace orlop::server {

// Returns a job's status, without joined_ranks and abort_reason. On the leader only.
v1::JobStatusResponse StatusOf(JobRuntime* job);
// Returns the status of a job that this server has quarantined, and why.
v1::JobStatusResponse StatusOf(const std::string& job, const absl::Status& quarantine);

// Returns OK unless the job's memory is lost. On the leader only.
//   Status  DataLoss (ROLLBACK_OFFERED with the step, or LOST): an operator must decide
absl::Status CheckMemory(JobRuntime* job);

// Adds to `*map` the servers of the cluster and up to kMaxPlacementRunsPerPage placement runs of
// `model`, from run number `first` on. `model` null: no runs. `*next` is set to the first run that
// did not fit, or to 0 if all did.
void FillPlacement(const JobTable& jobs, const JobModel* model, uint64_t first,
                   v1::PlacementMap* map, uint64_t* next);

}  // namespace orlop::server
