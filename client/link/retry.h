// When a call is tried again: the one place that decides, per RPC, from code and ErrorDetail alone.
//
// Every RPC of Orlop may be repeated: pushes are keyed, commits and joins are answered from store,
// and pages say where they belong.
#pragma once

#include <chrono>
#include <cstdint>

#include "absl/status/status.h"
#include "base/mutex.h"
#include "client/link/parts.h"

namespace orlop::client {

enum class Rpc {
  kRead,    // lists, status, manifest, placement, QueryPush
  kChange,  // CreateJob, ConfigureOptimizer, Join, DeleteJob, AcceptRollback, Hold, AbortStep
  kCommit,
  kPush,  // Push and SetState
  kPull,
};

enum class Verdict {
  kGiveUp,   // the caller must act, or time is over
  kBackOff,  // wait a little, then the same again
  kRepeat,   // the same again at once: bytes were damaged on the way
  kRefresh,  // read the placement map again, then again
  kFollow,   // ask the leader that ErrorDetail.server names
};

// What to do after `status` (not OK). Pure.
Verdict Judge(Rpc rpc, const absl::Status& status);

struct RetryOptions {
  Milliseconds first_backoff{20};
  Milliseconds longest_backoff{2'000};
  double budget = 100;           // retries that may be made at once ...
  double budget_per_second = 2;  // ... and how fast they come back
};

// Retries left to a client, so that a broken cluster is not hammered. Any thread.
class RetryBudget {
 public:
  using Clock = std::chrono::steady_clock;
  explicit RetryBudget(const RetryOptions& options) : options_(options), left_(options.budget) {}
  // Takes one retry; false: none is left.
  bool Spend(Clock::time_point now);
  uint64_t spent() const;

 private:
  const RetryOptions options_;
  mutable Mutex mutex_;
  double left_ GUARDED_BY(mutex_);
  uint64_t spent_ GUARDED_BY(mutex_) = 0;
  Clock::time_point last_ GUARDED_BY(mutex_) = {};
};

// How long to wait before retry `number` (from 0): doubling, with jitter between half and the
// whole. `random` is any 32 random bits.
Milliseconds BackoffBefore(int number, uint32_t random, const RetryOptions& options);

}  // namespace orlop::client
