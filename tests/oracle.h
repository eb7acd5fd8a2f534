// The workload of the simulator, and the oracle: what a job must hold after the steps that were
// acknowledged, computed in the plainest way and sharing nothing with the step machines but the
// decision records it checks.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "server/step/job.h"

namespace orlop::step {

uint64_t MixBits(uint64_t a, uint64_t b);

// What workers do, as a function of the seed: gradients differ by generation, step and attempt, so
// that bits show which attempt was applied.
struct Workload {
  uint64_t seed = 0;
  std::shared_ptr<const JobSpec> spec;

  // Which attempt of which step, by whom.
  struct Try {
    int64_t generation = 0;
    int64_t step = 0;
    int64_t attempt = 0;
  };
  bool IsLoad(int64_t step) const;
  bool IsNonFinite(const Try& at) const;  // rank 0 finds an infinity
  bool IsAbsent(const Try& at, Rank rank, TensorId tensor) const;
  bool IsLoaded(const Try& at, TensorId tensor) const;  // a LOAD sets the tensor
  // The first LOAD must be tried again: a worker leaves this shard out.
  bool IsLeftOut(const Try& at, ShardId shard) const;
  int64_t LoadedCount(const Try& at, TensorId tensor) const;  // applied_count; -1: not given
  uint64_t LoadedValue(const Try& at, TensorId tensor, int64_t element) const;
  uint64_t Gradient(const Try& at, Rank rank, TensorId tensor, int64_t element) const;  // 0..999
  // The stand-in for a kernel.
  static uint64_t Update(uint64_t value, uint64_t gradient, int64_t applied_count,
                         double sum_of_squares, int64_t step);
};

class Oracle {
 public:
  explicit Oracle(Workload workload);

  // Contributors of a generation, by element: `contributes(rank, tensor, element)` of its layout.
  void AddGeneration(int64_t generation, int world_size);
  static bool Contributes(const JobSpec& spec, int world_size, Rank rank, TensorId tensor,
                          int64_t element);

  // A decision that some server began to apply: fills steps whose acknowledgements were all lost.
  void Observe(const DecisionPtr& decision);
  // A worker was told that `decision` is committed, in `epoch`. False: `failure()` says what is
  // wrong.
  bool Acknowledge(const DecisionPtr& decision, int64_t epoch);
  // An operator's rollback took effect (level MEMORY only).
  bool RollBack(int64_t step, const Digest& decision, int64_t epoch);
  // Compares one copy of a shard with the replay.
  bool CheckShard(ShardId shard, int64_t step, const Digest& decision,
                  const std::vector<uint64_t>& values, const char* where);
  int64_t acknowledged_step() const { return acknowledged_; }
  const std::string& failure() const { return failure_; }

 private:
  struct Version {
    DecisionPtr decision;
    std::vector<std::vector<uint64_t>> values;  // by tensor
    std::vector<int64_t> applied_count;
  };
  bool Fail(std::string what);
  bool Extend(const DecisionPtr& decision);
  bool Replay(const DecisionPtr& decision);

  Workload workload_;
  std::unordered_map<int64_t, int> world_size_;
  std::vector<DecisionPtr> observed_;
  std::vector<Version> history_;  // by step
  int64_t acknowledged_ = -1;
  int64_t rollback_epoch_ = 0;
  std::string failure_;
};

}  // namespace orlop::step
