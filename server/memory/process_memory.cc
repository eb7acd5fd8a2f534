#include "server/memory/process_memory.h"

#include <malloc.h>

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>

namespace orlop::server {
namespace {

// gRPC reads into new slices of up to megabytes. By default malloc gives the top of each of its
// many arenas back to the system as soon as 128 KiB of it are free. Most pages of a push were
// therefore faulted in and cleared again, which took a third of the server's time
// (bench/RESULTS.md). One arena keeps the memory that one burst of messages needs, until TrimHeap.
constexpr int kArenas = 1;
constexpr int kKeptBytes = 64 << 20;   // more free bytes than this at the top are given back
constexpr int kGrowthBytes = 1 << 20;  // the heap grows by this much more than is needed
constexpr int kMappedBytes = 8 << 20;  // a block of this size or more has a mapping of its own

}  // namespace

uint64_t ResidentBytes() {
  std::ifstream in("/proc/self/smaps_rollup");
  uint64_t kib = 0;
  for (std::string line; std::getline(in, line);) {
    std::istringstream fields(line);
    std::string name;
    uint64_t value = 0;
    if (fields >> name >> value && (name == "Anonymous:" || name == "Pss_Shmem:")) kib += value;
  }
  return kib << 10;
}

void BoundHeap() {
  mallopt(M_ARENA_MAX, kArenas);
  mallopt(M_TRIM_THRESHOLD, kKeptBytes);
  mallopt(M_TOP_PAD, kGrowthBytes);
  mallopt(M_MMAP_THRESHOLD, kMappedBytes);
}

void TrimHeap() { malloc_trim(0); }

}  // namespace orlop::server
