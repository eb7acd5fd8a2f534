// The one thread pool of Orlop: servers queue the work of shards in it, kernels and benchmarks cut one
// job into parts. It can be placed on chosen processors.
#pragma once

#include <deque>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/mutex.h"

namespace orlop {

struct ThreadPlacement {
  int thread_count = 0;   // 0: as many as there are processors to run on
  std::vector<int> cpus;  // processors that may run them, any of them; empty: all
  int numa_node = -1;     // of `cpus`, those of this node; -1: any
};

// "0-3,8" as 0, 1, 2, 3, 8. InvalidArgument names the part that is no list of processors.
absl::StatusOr<std::vector<int>> ParseCpuList(absl::string_view list);

// The processors that a placement allows, ascending; empty: all.
//   Status  InvalidArgument: the machine has no such node, or none of its processors is allowed.
absl::StatusOr<std::vector<int>> CpusOf(const ThreadPlacement& placement);

// Tasks run first come, first served. The queue has no bound of its own: a caller bounds what it
// submits (a server has at most one task per shard).
//   Threads  Submit and Run from any thread, but not Run from a task of the same pool. The
//            destructor and Stop are the owner's.
class ThreadPool {
 public:
  // Starts `thread_count` threads; they run on `cpus` (CpusOf), or anywhere if it is empty. Without
  // threads of its own, the pool's Run does all work in the caller, and Submit is not allowed.
  explicit ThreadPool(int thread_count, const std::vector<int>& cpus = {});
  ~ThreadPool();

  int thread_count() const { return static_cast<int>(threads_.size()); }
  // InvalidArgument: the process may run on none of the processors asked for. The threads run
  // anywhere then.
  const absl::Status& pinned() const { return pinned_; }

  void Submit(std::function<void()> task);
  // Runs task(0) .. task(count - 1), each once and in no particular order, on the pool's threads and
  // the caller's. Returns when all are done.
  void Run(size_t count, const std::function<void(size_t)>& task);
  // Runs what was submitted, then joins the threads. A second call has no effect.
  void Stop();

 private:
  void Loop();

  Mutex mutex_;
  CondVar changed_;   // a task was queued, or the pool stops
  CondVar finished_;  // a thread has left a Run
  std::deque<std::function<void()>> tasks_ GUARDED_BY(mutex_);
  bool stopping_ GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
  absl::Status pinned_;
};

}  // namespace orlop
