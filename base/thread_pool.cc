#include "base/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "base/mutex.h"

namespace orlop {

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

ThreadPool::ThreadPool(int thread_count, const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) CPU_SET(cpu, &set);
  for (int i = 0; i < thread_count; ++i) {
    threads_.emplace_back([this] { Loop(); });
    if (!cpus.empty() &&
        pthread_setaffinity_np(threads_.back().native_handle(), sizeof(set), &set) != 0)
      pinned_ = absl::InvalidArgumentError(
          absl::StrCat("this process may run on none of the processors asked for, the first of "
                       "which is ",
                       cpus.front()));
  }
}

ThreadPool::~ThreadPool() { Stop(); }

void ThreadPool::Stop() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
  }
  changed_.SignalAll();
  for (std::thread& thread : threads_)
    if (thread.joinable()) thread.join();
}

void ThreadPool::Submit(std::function<void()> task) {
  {
    MutexLock lock(&mutex_);
    tasks_.push_back(std::move(task));
  }
  changed_.Signal();
}

void ThreadPool::Loop() {
  for (;;) {
    std::function<void()> task;
    {
      MutexLock lock(&mutex_);
      while (tasks_.empty() && !stopping_) changed_.Wait(&mutex_);
      if (tasks_.empty()) return;
      task = std::move(tasks_.front());
      tasks_.pop_front();
    }
    task();
  }
}

void ThreadPool::Run(size_t count, const std::function<void(size_t)>& task) {
  struct Call {
    std::atomic<size_t> next{0};
    size_t working = 0;  // threads that are still in this Run; guarded by mutex_
  } call;
  const auto run = [&] {
    for (size_t i = call.next.fetch_add(1); i < count; i = call.next.fetch_add(1)) task(i);
  };
  {
    MutexLock lock(&mutex_);
    call.working = std::min(threads_.size(), count);
    for (size_t i = 0; i < call.working; ++i)
      tasks_.emplace_back([this, &call, &run] {
        run();
        MutexLock lock(&mutex_);
        if (--call.working == 0) finished_.SignalAll();
      });
  }
  changed_.SignalAll();
  run();
  MutexLock lock(&mutex_);
  while (call.working > 0) finished_.Wait(&mutex_);
}

}  // namespace orlop
