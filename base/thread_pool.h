// The thread pool of Orlop. Servers queue the work of shards in it; kernels and benchmarks cut one
// job into parts. Its threads can be restricted to chosen processors.
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
  // 0: one per processor that the placement allows.
  int thread_count = 0;
  // Processors on which any of the threads may run; empty: all.
  std::vector<int> cpus;
  // If not -1, only those of `cpus` that belong to this NUMA node.
  int numa_node = -1;
};

// Parses "0-3,8" to 0, 1, 2, 3, 8. Status: InvalidArgument, naming the part that is not a list of
// processors.
absl::StatusOr<std::vector<int>> ParseCpuList(absl::string_view list);

// Returns the processors that a placement allows, ascending; empty: all.
//   Status  InvalidArgument: the machine has no such node, or none of its processors is allowed.
absl::StatusOr<std::vector<int>> CpusOf(const ThreadPlacement& placement);

// Tasks start in the order of submission. The queue has no bound of its own: callers must bound
// what they submit (a server has at most one task per shard).
//   Threads  Any thread may call Submit and Run, but a task must not call Run of its own pool. Only
//            the owner calls Stop and the destructor.
class ThreadPool {
 public:
  // Starts `thread_count` threads that run on `cpus` (from CpusOf), or anywhere if it is empty.
  // With 0 threads, Run does all the work in its caller, and Submit is not allowed.
  explicit ThreadPool(int thread_count, const std::vector<int>& cpus = {});
  ~ThreadPool();

  int thread_count() const { return static_cast<int>(threads_.size()); }
  // InvalidArgument: the process may run on none of `cpus`, so the threads run anywhere.
  const absl::Status& pinned() const { return pinned_; }

  void Submit(std::function<void()> task);
  // Runs task(0) .. task(count - 1), each once, in no particular order, on the pool's threads and
  // the caller's. Returns when all are done.
  void Run(size_t count, const std::function<void(size_t)>& task);
  // Runs all submitted tasks, then joins the threads. A second call has no effect.
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
