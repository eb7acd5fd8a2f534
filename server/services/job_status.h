// What several services say about a job: its status, whether its memory is lost, and where its
// shards are.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "orlop/v1/job.pb.h"
#include "server/runtime/job_table.h"

namespace orlop::server {

// On the leader: the job's state and where it stands, without abort reason and ranks.
v1::JobStatusResponse StatusOf(JobRuntime* job);

// Waits until the job has recovered, or its memory is known to be lost.
//   Status  DataLoss (ROLLBACK_OFFERED with the step, or LOST): an operator must decide.
absl::Status CheckMemory(JobRuntime* job, const Wait& wait);

// Fills in the cluster's servers and, of `model` (null: no job), up to kMaxPlacementRunsPerPage
// placement runs from number `first` on. `*next` is the first run that did not fit, 0 if all did.
void FillPlacement(const JobTable& jobs, const JobModel* model, uint64_t first,
                   v1::PlacementMap* map, uint64_t* next);

}  // namespace orlop::server
