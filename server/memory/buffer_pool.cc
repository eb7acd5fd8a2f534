#include "server/memory/buffer_pool.h"

#include <sys/mman.h>

#include <cstdint>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(data, bytes) ((void)(data), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(data, bytes) ((void)(data), (void)(bytes))
#endif

namespace orlop::server {
namespace {

constexpr uint64_t kHugePageBytes = 2 << 20;

}  // namespace

Pages MapPages(uint64_t bytes) {
  const uint64_t slack = bytes >= 2 * kHugePageBytes ? kHugePageBytes : 0;
  void* mapped =
      mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return {};
  auto* begin = static_cast<uint8_t*>(mapped);
  if (slack == 0) return {begin, bytes};
  // 2 MiB then cost one page fault and not 512.
  const uint64_t past = reinterpret_cast<uintptr_t>(begin) % kHugePageBytes;
  const uint64_t head = past == 0 ? 0 : kHugePageBytes - past;
  if (head > 0) munmap(begin, head);
  if (slack > head) munmap(begin + head + bytes, slack - head);
  madvise(begin + head, bytes / kHugePageBytes * kHugePageBytes, MADV_HUGEPAGE);
  return {begin + head, bytes};
}

void Unmap(const Pages& pages) {
  ASAN_UNPOISON_MEMORY_REGION(pages.data, pages.bytes);  // the addresses may be mapped again
  munmap(pages.data, pages.bytes);
}

void Unmap(const std::vector<Pages>& list) {
  for (const Pages& pages : list) Unmap(pages);
}

BufferPool::~BufferPool() { Unmap(ShrinkTo(0)); }

void BufferPool::Give(const Pages& pages, int64_t now_ms) {
  ASAN_POISON_MEMORY_REGION(pages.data, pages.bytes);
  by_age_.emplace(next_, Idle{pages, now_ms});
  by_bytes_[pages.bytes].push_back(next_++);
  idle_bytes_ += pages.bytes;
}

Pages BufferPool::Take(uint64_t bytes) {
  const auto same = by_bytes_.find(bytes);
  if (same == by_bytes_.end()) return {};
  const auto last = by_age_.find(same->second.back());
  const Pages pages = last->second.pages;
  by_age_.erase(last);
  same->second.pop_back();
  if (same->second.empty()) by_bytes_.erase(same);
  idle_bytes_ -= bytes;
  ASAN_UNPOISON_MEMORY_REGION(pages.data, pages.bytes);
  return pages;
}

void BufferPool::RemoveOldest(std::vector<Pages>* removed) {
  const auto oldest = by_age_.begin();
  const Pages pages = oldest->second.pages;
  const auto same = by_bytes_.find(pages.bytes);
  same->second.pop_front();  // numbers ascend, so the oldest is the first of its size
  if (same->second.empty()) by_bytes_.erase(same);
  by_age_.erase(oldest);
  idle_bytes_ -= pages.bytes;
  removed->push_back(pages);
}

std::vector<Pages> BufferPool::ShrinkTo(uint64_t most_bytes) {
  std::vector<Pages> removed;
  while (idle_bytes_ > most_bytes) RemoveOldest(&removed);
  return removed;
}

std::vector<Pages> BufferPool::Rest(int64_t before_ms) {
  std::vector<Pages> removed;
  while (!by_age_.empty() && by_age_.begin()->second.since_ms < before_ms) RemoveOldest(&removed);
  return removed;
}

}  // namespace orlop::server
