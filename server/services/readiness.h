// When a server that was started again is ready: once every job that it found on disk has come to
// an answer, be it a good one (READY, LOADING) or a bad one (ROLLBACK_OFFERED, LOST). The leader
// knows; the others ask it.
#pragma once

#include <string>

#include "server/runtime/job_table.h"

namespace orlop::server {

// What is still waited for, in words; empty: every job here has come to an answer. Takes at most a
// second.
//   Threads  safe from any thread.
std::string AwaitedBy(const JobTable& jobs);

}  // namespace orlop::server
