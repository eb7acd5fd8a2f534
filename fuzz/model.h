// The job that targets decode messages for: four tensors on two servers.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "orlop/v1/peer.pb.h"
#include "server/job/job_model.h"
#include "server/step/job.h"

namespace orlop::fuzz {

// "w" [8, 100] has shards 0 and 1 on server 0, and 2 and 3 on server 1. "bias" [100] is shard 4, on
// server 1. The buffer "count" [3] is shard 5, and "frozen" [2], which has no optimizer, shard 6:
// both are on server 0.
v1::JobDefinition Definition();
const server::JobModel& Model();

// Names and words of the job, for hints.
std::vector<std::string> Words();

// A decision of the job at a step, with its identity.
step::DecisionRecord Decision(int64_t step, step::DecisionKind kind);
// Sets the identity of a decision on the wire to the right one.
void Identify(v1::DecisionBody* decision);

}  // namespace orlop::fuzz
