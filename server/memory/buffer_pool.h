// The BufferPool keeps the pages of large buffers that were freed, so that the next step uses them
// again: mapped anew, each page would cost a page fault and be cleared by the kernel.
//
// Pages are kept by their exact number, since a step frees and allocates the same sizes as the one
// before it. The owner decides how many may be idle (ShrinkTo) and how long (Rest), and unmaps what
// these return.
//   Threads  not thread-safe.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <vector>

namespace orlop::server {

// A run of private pages.
struct Pages {
  uint8_t* data = nullptr;
  uint64_t bytes = 0;  // a multiple of 4 KiB
};

// Maps pages, filled with zeros. Runs of two huge pages (4 MiB) or more are aligned to huge pages,
// which the kernel then may use. `data` is null if the system refuses.
//   Threads  any
Pages MapPages(uint64_t bytes);
void Unmap(const Pages& pages);
void Unmap(const std::vector<Pages>& list);

class BufferPool {
 public:
  BufferPool() = default;
  ~BufferPool();
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;

  uint64_t idle_bytes() const { return idle_bytes_; }

  // Keeps pages until somebody takes them.
  void Give(const Pages& pages, int64_t now_ms);
  // Returns the pages of this size that were given last; null data if there are none. What they
  // hold is left over from earlier buffers.
  Pages Take(uint64_t bytes);
  // Removes and returns the pages that have been idle longest, until at most `most_bytes` are idle.
  std::vector<Pages> ShrinkTo(uint64_t most_bytes);
  // Removes and returns the pages that were given before `before_ms`.
  std::vector<Pages> Rest(int64_t before_ms);

 private:
  struct Idle {
    Pages pages;
    int64_t since_ms = 0;
  };
  void RemoveOldest(std::vector<Pages>* removed);

  uint64_t idle_bytes_ = 0;
  uint64_t next_ = 0;                                  // number of the next pages that are given
  std::map<uint64_t, Idle> by_age_;                    // by the number under which they were given
  std::map<uint64_t, std::deque<uint64_t>> by_bytes_;  // numbers, ascending
};

}  // namespace orlop::server
