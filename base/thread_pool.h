// Threads for kernels over many ranges, on chosen processors.
//   Threads   one caller at a time uses a pool.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace orlop::kernels {

struct ThreadPlacement {
  int thread_count = 0;   // 0: as many as there are processors to run on
  std::vector<int> cpus;  // processors that may run them, any of them; empty: all
  int numa_node = -1;     // of `cpus`, those of this node; -1: any
};

// "0-3,8" as 0, 1, 2, 3, 8. InvalidArgument naming the part that is none.
absl::StatusOr<std::vector<int>> ParseCpuList(absl::string_view list);

// The processors that a placement allows, ascending; empty: all. InvalidArgument (a node that this
// machine does not have, or none of its processors is allowed).
absl::StatusOr<std::vector<int>> CpusOf(const ThreadPlacement& placement);

// Moves the calling thread to these processors. InvalidArgument if it may run on none of them.
absl::Status PinThisThread(const std::vector<int>& cpus);

class ThreadPool {
 public:
  // The threads run on `cpus` (CpusOf); empty: anywhere.
  ThreadPool(int thread_count, std::vector<int> cpus);
  ~ThreadPool();

  int thread_count() const;
  // task(0) .. task(count - 1), each once, on the pool's threads and the caller's; returns when all
  // are done. Nothing is promised of their order.
  void Run(size_t count, const std::function<void(size_t)>& task);

 private:
  struct Shared;
  std::unique_ptr<Shared> shared_;
  std::vector<std::thread> threads_;
};

}  // namespace orlop::kernels
