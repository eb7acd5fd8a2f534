// Whether a restarted server is ready. It is ready when the recovery of every job that it found on
// disk has ended (v1::JobStatusResponse::State): in READY or LOADING, or in ROLLBACK_OFFERED or
// LOST, which an operator must settle. The step leader knows these states; other servers ask it.
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <thread>

#include "base/mutex.h"
#include "server/runtime/job_table.h"

namespace orlop::server {

// Returns what this server waits for, as a sentence for its log: the first job that still recovers,
// or a step leader that does not answer. Returns "" if the server is ready. A job that the leader
// does not know was deleted and counts as recovered. On a server that is not the leader this is one
// RPC with a timeout of one second.
//   Threads  safe from any thread.
std::string WhatIsAwaited(const JobTable& jobs);

// Asks that again and again, in a thread of its own, until the server is ready. There is no time
// limit; the log says every ten seconds which job is awaited.
//   Threads  all methods are safe from any thread.
class Readiness {
 public:
  // `jobs` outlives this object. `on_ready` is called once, in the thread, unless End comes first.
  Readiness(const JobTable* jobs, std::function<void()> on_ready)
      : jobs_(jobs), on_ready_(std::move(on_ready)) {}
  ~Readiness() { End(); }

  void Start();  // called once

  bool is_ready() const { return is_ready_; }  // stays true
  // The last answer of WhatIsAwaited; "": none yet.
  std::string awaited() const;
  // Stops asking, and waits for the thread.
  void End();

 private:
  void Run();

  const JobTable* const jobs_;
  const std::function<void()> on_ready_;
  std::atomic<bool> is_ready_ = false;
  mutable Mutex mutex_;
  CondVar ended_;
  bool ends_ GUARDED_BY(mutex_) = false;
  std::string awaited_ GUARDED_BY(mutex_);
  Mutex join_mutex_;
  std::thread thread_ GUARDED_BY(join_mutex_);
};

}  // namespace orlop::server
