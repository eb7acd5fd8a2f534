// The order in which a job's shards make a committed step. Shards go to the thread pool in order of
// next use. The shards of a tensor whose optimizer takes a pass over all of it first wait until all
// of them are committed; matrices take their passes one after another, because memory for one is
// reserved. Whatever finds no room waits for Retry.
//
// Threads  all methods are safe from any thread. `done` is called from a pool thread without a
//          lock.
// Life     a task that is under way holds the `owner` it was submitted with; the owner owns the
//          queue and the shards.
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
  // Called once for every shard that has made its step (OK) or never will (the damage).
  using Done = std::function<void(int32_t shard, const step::DecisionPtr& decision,
                                  const absl::Status& status)>;

  // `shards` and `pool` outlive the queue.
  ApplyQueue(std::shared_ptr<const step::JobSpec> spec, ShardStore* shards, ThreadPool* pool,
             Done done);

  // Begins the applies of one decision; more of the same decision may follow. `model` is the job's
  // present configuration.
  //   Status  InvalidArgument: the decision's scalars do not fit the configuration.
  absl::Status Begin(std::vector<step::StartApply> applies, const JobModel& model, Owner owner);
  // Tries again what waits for room.
  void Retry(const Owner& owner);
  // Forgets everything that has not finished: a flush is being loaded over the shards. What is
  // under way ends without a call of `done`.
  void Clear();
  // Why applies wait for room; OK if none does.
  absl::Status room_status() const;

 private:
  // One decision. Updates of a round that was cleared are not wanted any more.
  struct Round {
    step::DecisionPtr decision;
    DecisionScalars scalars;
    int64_t loads = 0;  // ShardUpdate::loads
  };
  using RoundPtr = std::shared_ptr<const Round>;
  struct Update {
    int32_t shard = 0;
    RoundPtr round;
    std::shared_ptr<const PassResult> pass;  // if the optimizer takes one
  };
  // The first phase of a tensor's step.
  struct Pass {
    uint32_t tensor = 0;
    std::vector<Update> updates;
  };

  uint32_t TensorOf(int32_t shard) const {
    return static_cast<uint32_t>(spec_->shards[shard].tensor);
  }
  kernels::Scope ScopeOf(uint32_t tensor) const;
  bool TakesPass(const Round& round, uint32_t tensor) const;
  void WaitForRoom(const absl::Status& status, const Round& round) REQUIRES(mutex_);
  void SubmitUpdate(Update update, const Owner& owner);
  void SubmitPass(Pass pass, const Owner& owner) REQUIRES(mutex_);
  void ApplyInPool(Update update, const Owner& owner);
  void PassInPool(Pass pass, const Owner& owner);
  void EndUpdateOfMatrix(const Update& update, const Owner& owner) REQUIRES(mutex_);

  const std::shared_ptr<const step::JobSpec> spec_;
  ShardStore* const shards_;
  ThreadPool* const pool_;
  const Done done_;
  std::vector<size_t> shard_count_;  // by tensor
  mutable Mutex mutex_;
  RoundPtr round_ GUARDED_BY(mutex_);                      // the newest; null after Clear
  std::map<uint32_t, Pass> gathering_ GUARDED_BY(mutex_);  // tensors that miss some of their shards
  std::deque<Pass> passes_waiting_ GUARDED_BY(mutex_);     // for room, or for another matrix
  size_t matrix_updates_left_ GUARDED_BY(mutex_) = 0;      // of the matrix whose pass was begun
  std::vector<Update> updates_waiting_ GUARDED_BY(mutex_);  // for room
  absl::Status room_status_ GUARDED_BY(mutex_);             // why the newest of them waits
};

}  // namespace orlop::server
