#include "server/runtime/apply_queue.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "base/thread_pool.h"
#include "kernels/optimizer.h"
#include "server/job/job_model.h"
#include "server/job/slots.h"
#include "server/runtime/step_scalars.h"
#include "server/shards/shard_store.h"
#include "server/step/actions.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "spdlog/spdlog.h"

namespace orlop::server {

ApplyQueue::ApplyQueue(std::shared_ptr<const step::JobSpec> spec, ShardStore* shards,
                       ThreadPool* pool, Done done)
    : spec_(std::move(spec)),
      shards_(shards),
      pool_(pool),
      done_(std::move(done)),
      shard_count_(spec_->tensors.size()) {
  for (const step::ShardSpec& shard : spec_->shards) ++shard_count_[shard.tensor];
}

absl::Status ApplyQueue::Begin(std::vector<step::StartApply> applies, const JobModel& model,
                               const Owner& owner) {
  std::map<int32_t, size_t> place;
  for (int32_t shard : shards_->NextUseOrder()) place.emplace(shard, place.size());
  std::stable_sort(applies.begin(), applies.end(),
                   [&](const step::StartApply& a, const step::StartApply& b) {
                     return place[a.shard] < place[b.shard];
                   });
  MutexLock lock(&mutex_);
  const step::DecisionPtr& decision = applies.front().decision;
  if (round_ == nullptr || round_->decision != decision) {
    absl::StatusOr<DecisionScalars> scalars = DecisionScalars::Parse(model, *decision);
    if (!scalars.ok()) return scalars.status();
    round_ = std::make_shared<Round>(Round{decision, *std::move(scalars), shards_->loads()});
  }
  for (const step::StartApply& apply : applies) {
    const uint32_t tensor = TensorOf(apply.shard);
    if (!TakesPass(*round_, tensor)) {
      SubmitUpdate({apply.shard, round_, nullptr}, owner);
      continue;
    }
    Pass& pass = gathering_[tensor];
    pass.tensor = tensor;
    pass.updates.push_back({apply.shard, round_, nullptr});
    if (pass.updates.size() < shard_count_[tensor]) continue;
    SubmitPass(std::move(pass), owner);
    gathering_.erase(tensor);
  }
  return absl::OkStatus();
}

void ApplyQueue::Retry(const Owner& owner) {
  MutexLock lock(&mutex_);
  room_status_ = absl::OkStatus();
  for (Update& update : std::exchange(updates_waiting_, {})) SubmitUpdate(std::move(update), owner);
  for (Pass& pass : std::exchange(passes_waiting_, {})) SubmitPass(std::move(pass), owner);
}

void ApplyQueue::Clear() {
  MutexLock lock(&mutex_);
  round_ = nullptr;
  gathering_.clear();
  passes_waiting_.clear();
  updates_waiting_.clear();
  matrix_updates_left_ = 0;
}

absl::Status ApplyQueue::room_status() const {
  MutexLock lock(&mutex_);
  return room_status_;
}

kernels::Scope ApplyQueue::ScopeOf(uint32_t tensor) const {
  const TensorOptimizer optimizer = shards_->optimizer(tensor);
  return optimizer.frozen() ? kernels::Scope::kElement : optimizer.optimizer->scope;
}

bool ApplyQueue::TakesPass(const Round& round, uint32_t tensor) const {
  const ShardUpdate update = round.scalars.UpdateFor(tensor);
  return update.kind == ShardUpdate::Kind::kApply && !update.untouched &&
         ScopeOf(tensor) != kernels::Scope::kElement;
}

void ApplyQueue::WaitForRoom(const absl::Status& status, const Round& round) {
  if (room_status_.ok())
    spdlog::warn("step {} waits for room: {}", round.decision->step, std::string(status.message()));
  room_status_ = status;
}

// ---- Passes ------------------------------------------------------------------------------------

void ApplyQueue::SubmitPass(Pass pass, const Owner& owner) {
  const bool is_matrix = ScopeOf(pass.tensor) == kernels::Scope::kMatrix;
  if (is_matrix && matrix_updates_left_ > 0) return passes_waiting_.push_back(std::move(pass));
  if (is_matrix) matrix_updates_left_ = pass.updates.size();
  pool_->Submit(
      [this, owner, pass = std::move(pass)]() mutable { PassInPool(std::move(pass), owner); });
}

void ApplyQueue::PassInPool(Pass pass, const Owner& owner) {
  const RoundPtr round = pass.updates.front().round;
  {
    MutexLock lock(&mutex_);
    if (round != round_ || round->loads != shards_->loads()) return;
  }
  auto found = shards_->RunPass(pass.tensor, round->scalars.UpdateFor(pass.tensor));
  {
    MutexLock lock(&mutex_);
    if (round != round_ || round->loads != shards_->loads()) return;
    if (found.ok()) {
      for (Update& update : pass.updates) {
        update.pass = *found;
        SubmitUpdate(std::move(update), owner);
      }
      return;
    }
    for (const Update& update : pass.updates) EndUpdateOfMatrix(update, owner);
    if (absl::IsResourceExhausted(found.status())) {  // no shard was changed
      WaitForRoom(found.status(), *round);
      return passes_waiting_.push_back(std::move(pass));
    }
  }
  for (const Update& update : pass.updates) done_(update.shard, round->decision, found.status());
}

// Counts an update of a matrix that has ended. After the last one, the next waiting pass begins.
void ApplyQueue::EndUpdateOfMatrix(const Update& update, const Owner& owner) {
  if (ScopeOf(TensorOf(update.shard)) != kernels::Scope::kMatrix) return;
  if (matrix_updates_left_ == 0) return;
  --matrix_updates_left_;
  if (matrix_updates_left_ > 0 || passes_waiting_.empty()) return;
  Pass next = std::move(passes_waiting_.front());
  passes_waiting_.pop_front();
  SubmitPass(std::move(next), owner);
}

// ---- Updates -----------------------------------------------------------------------------------

void ApplyQueue::SubmitUpdate(Update update, const Owner& owner) {
  pool_->Submit([this, owner, update = std::move(update)]() mutable {
    ApplyInPool(std::move(update), owner);
  });
}

void ApplyQueue::ApplyInPool(Update update, const Owner& owner) {
  ShardUpdate wanted = update.round->scalars.UpdateFor(TensorOf(update.shard));
  wanted.loads = update.round->loads;
  wanted.pass = std::exchange(update.pass, nullptr);
  const bool has_pass = wanted.pass != nullptr;
  const absl::Status status = shards_->Apply(update.shard, wanted);
  if (absl::IsAborted(status)) return;  // a flush was loaded meanwhile
  const bool waits = absl::IsResourceExhausted(status);
  if (waits) update.pass = std::move(wanted.pass);  // for the next try
  wanted.pass.reset();  // the last update frees the memory of the pass before the next pass begins
  {
    MutexLock lock(&mutex_);
    if (update.round != round_) return;
    if (waits) {  // the disk is full, and the shard was not changed
      WaitForRoom(status, *update.round);
      return updates_waiting_.push_back(std::move(update));
    }
    if (has_pass) EndUpdateOfMatrix(update, owner);
  }
  done_(update.shard, update.round->decision, status);
}

}  // namespace orlop::server
