// What the kernel says this process holds, and what malloc keeps of it.
#pragma once

#include <cstdint>

namespace orlop::server {

// Bytes of anonymous and shared (memfd, tmpfs) resident memory; 0 where the kernel does not tell.
uint64_t ResidentBytes();

// Call before the first thread. Small things and gRPC's read buffers come from malloc, which would
// keep what they free in as many arenas as there are threads, out of reach of TrimHeap; large
// buffers never come from it (server/memory/accountant.h).
void BoundHeap();
// Gives free pages of malloc back to the system. Costs a walk through its free lists, and page
// faults of those that come next.
void TrimHeap();

}  // namespace orlop::server
