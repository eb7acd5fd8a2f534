// Runs the applies of a job's committed decisions in the thread pool. Each shard has one update,
// which makes its next version. Updates are submitted in the order in which pulls will need the
// shards (ShardStore::NextUseOrder).
//
// A two-phase optimizer (LAMB, Adafactor, Muon) first takes a pass over the whole tensor, which
// reads all of its shards. The queue collects the updates of such a tensor until all of its shards
// are committed here, runs one pass, and then submits the updates. A pass of Scope::kMatrix (Muon)
// begins only after the last update of the one before, because memory for only one is reserved.
//
// A pass or update that gets ResourceExhausted (memory or disk space) has changed nothing. It waits
// until Retry.
//
// Threads  All methods are safe from any thread. `done` is called from a pool thread that holds no
//          lock of the queue.
// Life     A task in the pool keeps the `owner` that it was submitted with. The owner owns the
//          queue and the shards, so both outlive the task.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "base/mutex.h"
#include "base/thread_pool.h"
#include "server/job/job_model.h"
#include "server/runtime/step_scalars.h"
#include "server/shards/shard_store.h"
#include "server/step/actions.h"

namespace orlop::server {

class ApplyQueue {
 public:
  using Owner = std::shared_ptr<const void>;
  // Called once for each apply that ends, unless Clear has dropped it. `status` is OK if the shard
  // has made its step. Otherwise the shard is damaged, and it will never make this step.
  using Done = std::function<void(int32_t shard, const step::DecisionPtr& decision,
                                  const absl::Status& status)>;

  // `shards` and `pool` must outlive the queue.
  ApplyQueue(std::shared_ptr<const step::JobSpec> spec, ShardStore* shards, ThreadPool* pool,
             Done done);

  // Submits applies. There is at least one, and all belong to one decision; a later call may bring
  // more applies of the same decision. `model` must have the job's current configuration.
  //   Status  DataLoss: the decision's scalars cannot be read or do not fit the configuration.
  //           Nothing was submitted, and `done` will not be called.
  absl::Status Begin(std::vector<step::StartApply> applies, const JobModel& model,
                     const Owner& owner);
  // Submits the waiting passes and updates again. JobRuntime calls it at every tick.
  void Retry(const Owner& owner);
  // Drops all passes and updates that have not finished, because a flush is about to replace the
  // shards. `done` is not called for them, nor for one that a pool thread is applying; a call that
  // has already begun may still be running.
  void Clear();
  // Returns the newest ResourceExhausted of a pass or update; OK if there was none since Retry.
  absl::Status room_status() const;

 private:
  // What the updates of one decision share. A task drops its update if its round is not round_ any
  // more, because Clear was called.
  struct Round {
    step::DecisionPtr decision;
    DecisionScalars scalars;
    int64_t loads = 0;  // ShardStore::loads() when the round began
  };
  using RoundPtr = std::shared_ptr<const Round>;
  // The apply of one shard.
  struct Update {
    int32_t shard = 0;
    RoundPtr round;
    std::shared_ptr<const PassResult> pass;  // of the tensor; null: none, or not yet
  };
  // The pass over a tensor, and the updates that need its result.
  struct Pass {
    uint32_t tensor = 0;
    std::vector<Update> updates;
  };

  uint32_t TensorOf(int32_t shard) const {
    return static_cast<uint32_t>(spec_->shards[shard].tensor);
  }
  kernels::Scope ScopeOf(uint32_t tensor) const;
  bool TakesPass(const Round& round, uint32_t tensor) const;
  // Stores the reason why a pass or update of `round` waits (room_status). Does not wait itself.
  void WaitForRoom(const absl::Status& status, const Round& round) REQUIRES(mutex_);
  void SubmitUpdate(Update update, const Owner& owner);
  void SubmitPass(Pass pass, const Owner& owner) REQUIRES(mutex_);
  void ApplyInPool(Update update, const Owner& owner);
  void PassInPool(Pass pass, const Owner& owner);
  // Counts an update whose tensor is a matrix as ended. After the last one of the tensor, submits
  // the next pass.
  void EndUpdateOfMatrix(const Update& update, const Owner& owner) REQUIRES(mutex_);

  const std::shared_ptr<const step::JobSpec> spec_;
  ShardStore* const shards_;
  ThreadPool* const pool_;
  const Done done_;
  std::vector<size_t> shard_count_;  // of the job, by tensor
  mutable Mutex mutex_;
  RoundPtr round_ GUARDED_BY(mutex_);  // of the newest decision; null: none, or cleared
  // By tensor: the passes of which some shards are not committed yet.
  std::map<uint32_t, Pass> gathering_ GUARDED_BY(mutex_);
  // These wait for room, or for the matrix before them.
  std::deque<Pass> passes_waiting_ GUARDED_BY(mutex_);
  // Updates that have not ended, of the matrix whose pass was submitted.
  size_t matrix_updates_left_ GUARDED_BY(mutex_) = 0;
  std::vector<Update> updates_waiting_ GUARDED_BY(mutex_);  // these wait for room
  absl::Status room_status_ GUARDED_BY(mutex_);             // see room_status
};

}  // namespace orlop::server
