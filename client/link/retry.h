// Decides whether a failed call is tried again, and how. Nothing else in the client does. The
// decision uses only the RPC, the status code and the ErrorDetail.
//
// Every RPC of Orlop may be repeated: a server recognises repeated pushes by their key, answers a
// repeated commit or join from a stored answer, and a page says which part of the list it is.
#pragma once

#include <chrono>
#include <cstdint>

#include "absl/status/status.h"
#include "base/mutex.h"
#include "client/link/parts.h"

namespace orlop::client {

enum class Rpc {
  kRead,  // lists, status, manifest, placement, QueryPush
  // CreateJob, ConfigureOptimizer, Join, DeleteJob, AcceptRollback, FlushJob, Hold, AbortStep
  kChange,
  kCommit,
  kPush,  // Push and SetState
  kPull,
};

enum class Verdict {
  // The caller must act, or the time is over.
  kGiveUp,
  // Wait, then repeat the call.
  kBackOff,
  // Repeat the call at once: bytes were damaged on the way.
  kRepeat,
  // Read the placement map again, then repeat the call.
  kRefresh,
  // Repeat the call to the leader that ErrorDetail.server names.
  kFollow,
};

// Returns the action to take after `status`, which is not OK. A pure function.
Verdict Judge(Rpc rpc, const absl::Status& status);

struct RetryOptions {
  Milliseconds first_backoff{20};
  Milliseconds longest_backoff{2'000};
  // Retries that may be made without a pause.
  double budget = 100;
  // Rate at which spent retries are restored.
  double budget_per_second = 2;
};

// Limits the retries of a client, so that clients do not overload a failing cluster. Threads: any.
class RetryBudget {
 public:
  using Clock = std::chrono::steady_clock;
  explicit RetryBudget(const RetryOptions& options) : options_(options), left_(options.budget) {}
  // Takes one retry. Returns false if none is left.
  bool Spend(Clock::time_point now);
  uint64_t spent() const;

 private:
  const RetryOptions options_;
  mutable Mutex mutex_;
  double left_ GUARDED_BY(mutex_);
  uint64_t spent_ GUARDED_BY(mutex_) = 0;
  Clock::time_point last_ GUARDED_BY(mutex_);
};

// Returns the wait before retry `number` (from 0): it doubles each time up to longest_backoff,
// times a factor between 0.5 and 1 taken from `random`, 32 random bits.
Milliseconds BackoffBefore(int number, uint32_t random, const RetryOptions& options);

}  // namespace orlop::client
