#include "base/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <fstream>
#include <mutex>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace orlop::kernels {

absl::StatusOr<std::vector<int>> ParseCpuList(absl::string_view list) {
  std::vector<int> cpus;
  for (absl::string_view part : absl::StrSplit(list, ',', absl::SkipWhitespace())) {
    const std::vector<absl::string_view> ends = absl::StrSplit(part, '-');
    int first = 0, last = 0;
    const bool valid = ends.size() <= 2 && absl::SimpleAtoi(ends.front(), &first) &&
                       absl::SimpleAtoi(ends.back(), &last) && first >= 0 && first <= last &&
                       last < CPU_SETSIZE;
    if (!valid)
      return absl::InvalidArgumentError(absl::StrCat("'", part, "' of the processors '", list,
                                                     "' is neither N nor N-M below ", CPU_SETSIZE));
    for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
  }
  std::sort(cpus.begin(), cpus.end());
  cpus.erase(std::unique(cpus.begin(), cpus.end()), cpus.end());
  return cpus;
}

absl::StatusOr<std::vector<int>> CpusOf(const ThreadPlacement& placement) {
  if (placement.numa_node < 0) return placement.cpus;
  std::ifstream file(
      absl::StrCat("/sys/devices/system/node/node", placement.numa_node, "/cpulist"));
  std::string line;
  if (!std::getline(file, line))
    return absl::InvalidArgumentError(
        absl::StrCat("this machine has no NUMA node ", placement.numa_node));
  absl::StatusOr<std::vector<int>> node = ParseCpuList(absl::StripAsciiWhitespace(line));
  if (!node.ok() || placement.cpus.empty()) return node;
  std::vector<int> both;
  std::set_intersection(node->begin(), node->end(), placement.cpus.begin(), placement.cpus.end(),
                        std::back_inserter(both));
  if (both.empty())
    return absl::InvalidArgumentError(
        absl::StrCat("NUMA node ", placement.numa_node, " has none of the processors asked for"));
  return both;
}

absl::Status PinThisThread(const std::vector<int>& cpus) {
  if (cpus.empty()) return absl::OkStatus();
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) CPU_SET(cpu, &set);
  if (sched_setaffinity(0, sizeof(set), &set) == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "this process may run on none of the processors asked for, the first of which is ",
      cpus.front()));
}

struct ThreadPool::Shared {
  std::mutex mutex;
  std::condition_variable changed;
  const std::function<void(size_t)>* task = nullptr;
  size_t count = 0;
  std::atomic<size_t> next{0};
  int working = 0;    // threads that still run tasks of this call
  uint64_t call = 0;  // raised by each Run
  bool stopping = false;

  void RunTasks(const std::function<void(size_t)>& run) {
    for (size_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) run(i);
  }

  void Loop() {
    for (uint64_t seen = 0;;) {
      const std::function<void(size_t)>* run;
      {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return stopping || call != seen; });
        if (stopping) return;
        seen = call;
        run = task;
      }
      RunTasks(*run);
      std::lock_guard<std::mutex> lock(mutex);
      if (--working == 0) changed.notify_all();
    }
  }
};

ThreadPool::ThreadPool(int thread_count, std::vector<int> cpus)
    : shared_(std::make_unique<Shared>()) {
  for (int i = 1; i < thread_count; ++i) {
    threads_.emplace_back([this, cpus] {
      (void)PinThisThread(cpus);  // what may not be pinned runs where it may
      shared_->Loop();
    });
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    shared_->stopping = true;
  }
  shared_->changed.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

int ThreadPool::thread_count() const { return static_cast<int>(threads_.size()) + 1; }

void ThreadPool::Run(size_t count, const std::function<void(size_t)>& task) {
  {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    shared_->task = &task;
    shared_->count = count;
    shared_->next = 0;
    shared_->working = static_cast<int>(threads_.size());
    ++shared_->call;
  }
  shared_->changed.notify_all();
  shared_->RunTasks(task);
  std::unique_lock<std::mutex> lock(shared_->mutex);
  shared_->changed.wait(lock, [&] { return shared_->working == 0; });
}

}  // namespace orlop::kernels
