// When the leader of a job has its state written to disk while the job runs.
//   Threads  not thread-safe.
#pragma once

#include <algorithm>
#include <cstdint>

namespace orlop::server {

class FlushSchedule {
 public:
  // A flush begins `every_ms` after the end of the one before, or after the start; 0: never. Where
  // flushes would take more than a fiftieth of the time, the wait is longer. Times are those of one
  // monotonic clock, in ms.
  FlushSchedule(int64_t every_ms, int64_t now_ms)
      : every_ms_(every_ms), next_ms_(now_ms + every_ms) {}

  // Returns whether a flush is to begin now. -1: no step is committed or flushed.
  bool IsDue(int64_t now_ms, int64_t committed_step, int64_t flushed_step) const {
    return every_ms_ > 0 && now_ms >= next_ms_ && committed_step > flushed_step;
  }
  // A flush, whoever has asked for it, has taken this long, and has succeeded or failed.
  void Ended(int64_t begin_ms, int64_t now_ms) {
    next_ms_ = now_ms + std::max(every_ms_, kShare * (now_ms - begin_ms));
  }

 private:
  static constexpr int64_t kShare = 49;  // of the time a flush takes, until the next one

  const int64_t every_ms_;
  int64_t next_ms_;
};

}  // namespace orlop::server
