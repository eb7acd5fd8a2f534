// This header reads how much memory the process has, and limits what malloc keeps of it.
//   Threads  any, but for BoundHeap
#pragma once

#include <cstdint>

namespace orlop::server {

// Returns the bytes of resident memory that no file backs: anonymous memory, and this process's
// share of memfd and tmpfs. 0 if the kernel has no /proc/self/smaps_rollup.
uint64_t ResidentBytes();

// Restricts malloc to one arena. Call it before the first thread is created. Small objects and
// gRPC's read buffers come from malloc, which by default keeps freed memory in many arenas (up to
// eight for each processor). Large buffers do not come from malloc (server/memory/accountant.h).
void BoundHeap();
// Gives the free pages of malloc back to the system. This walks malloc's free lists, and later
// allocations cause page faults again.
void TrimHeap();

}  // namespace orlop::server
