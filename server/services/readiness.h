// Whether a restarted server is ready. It is ready when the recovery of every job that it found on
// disk has ended (v1::JobStatusResponse::State): in READY or LOADING, or in ROLLBACK_OFFERED or
// LOST, which an operator must settle. The step leader knows these states; other servers ask it.
#pragma once

#include <string>

#include "server/runtime/job_table.h"

namespace orlop::server {

// Returns what this server waits for, as a sentence for its log: the first job that still recovers,
// or a step leader that does not answer. Returns "" if the server is ready. A job that the leader
// does not know was deleted and counts as recovered. On a server that is not the leader this is one
// RPC with a timeout of one second.
//   Threads  safe from any thread.
std::string AwaitedBy(const JobTable& jobs);

}  // namespace orlop::server
