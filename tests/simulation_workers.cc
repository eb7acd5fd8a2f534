// Workers and the operator of the simulation: join, push, commit, abort, roll back.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "server/step/actions.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/leader.h"
#include "server/step/messages.h"
#include "server/step/reason.h"
#include "server/step/requests.h"
#include "tests/oracle.h"
#include "tests/simulation.h"
#include "tests/simulator.h"

namespace orlop::step {

int Simulation::WorldSize(int64_t generation) const {
  return static_cast<int>(1 + MixBits(seed_, generation) % most_workers_);
}

void Simulation::Ask(ServerId server, Call call,
                     std::function<void(RequestId, Host&, Actions*)> ask) {
  const RequestId request = next_request_++;
  if (call.worker >= 0) call.life = workers_[call.worker].life;
  calls_[request] = call;
  const auto deliver = [this, server, request, ask = std::move(ask)] {
    Host& host = hosts_[server];
    if (!host.is_up) return;
    Actions actions;
    ask(request, host, &actions);
    Perform(server, &actions);
  };
  Carry(deliver, [this, asked = call.asked] {
    if (asked == Asked::kCommit) Meet(Met::kCommitRepeated);
  });
}

// Everybody has all of tensor 0; the rows of tensor 1 are dealt out.
std::vector<Contribution> Simulation::ContributionsOf(Rank rank, int64_t generation) const {
  const int64_t world_size = WorldSize(generation);
  const auto begin = static_cast<uint64_t>(rank * int64_t{4} / world_size);
  const auto end = static_cast<uint64_t>((rank + 1) * int64_t{4} / world_size);
  return {{0, Mode::kSum, {FlatBox(0, 3)}},
          {1, Mode::kExactlyOnce, {Box{{begin, 0}, {end - begin, 2}}}}};
}

void Simulation::Rejoin(Worker* worker) {
  worker->is_joined = false;
  worker->commit_sent = false;
  worker->retry_ms = now_ + 5 + random_.Below(20);
}

void Simulation::StartStep(Worker* worker, const Position& position) {
  worker->is_joined = true;
  worker->position = position;
  worker->commit_sent = false;
  worker->retry_ms = 0;
  worker->refusals = 0;
  worker->pieces.clear();
  const Workload::Try at{position.generation, position.committed_step + 1, position.attempt};
  for (size_t id = 0; id < spec_->shards.size(); ++id) {
    const ShardSpec& shard = spec_->shards[id];
    if (workload_.IsLoad(at.step)) {
      if (worker->rank == 0 && workload_.IsLoaded(at, shard.tensor) &&
          !workload_.IsLeftOut(at, static_cast<ShardId>(id))) {
        worker->pieces.push_back({static_cast<ShardId>(id), 99});
      }
      continue;
    }
    if (!spec_->tensors[shard.tensor].receives_gradient) continue;
    if (workload_.IsAbsent(at, worker->rank, shard.tensor)) continue;
    const std::vector<Contribution> own = ContributionsOf(worker->rank, at.generation);
    const Box& box = own[shard.tensor].boxes[0];
    const Shape& shape = spec_->tensors[shard.tensor].shape;
    if (!BoxPart(box, shape, shard.range).empty()) {
      worker->pieces.push_back({static_cast<ShardId>(id), 0});
    }
  }
}

PushPiece Simulation::BuildPiece(const Worker& worker, const WorkPiece& piece) const {
  const Position& position = worker.position;
  PushPiece push;
  push.key = {position.generation, position.committed_step + 1,
              position.attempt,    piece.shard,
              worker.rank,         piece.region};
  push.epoch = position.epoch;
  push.is_load = workload_.IsLoad(push.key.step);
  const Workload::Try at{push.key.generation, push.key.step, push.key.attempt};
  const TensorId tensor = spec_->shards[piece.shard].tensor;
  if (push.is_load) push.applied_count = workload_.LoadedCount(at, tensor);
  push.payload = {MixBits(workload_.Gradient(at, worker.rank, tensor, 0), piece.shard), 1};
  return push;
}

JoinRequest Simulation::BuildJoin(Rank rank, const std::string& client) const {
  return {rank,
          WorldSize(generation_),
          generation_,
          ContributionsOf(rank, generation_),
          workers_[rank].max_committed,
          client};
}

void Simulation::SendJoin(Worker* worker) {
  Call call{.worker = worker->rank, .asked = Asked::kJoin, .generation = generation_};
  call.client = absl::StrCat("worker ", worker->rank, " life ", worker->life);
  worker->retry_ms = now_ + 300;
  Ask(leader_, call,
      [this, join = BuildJoin(worker->rank, call.client)](RequestId request, Host& host,
                                                          Actions* actions) {
        if (host.leader != nullptr) host.leader->OnJoin(request, join, now_, actions);
      });
}

// Another process takes itself for one of the workers.
void Simulation::ClaimARank() {
  if (generation_ == 0) return;
  const Rank rank = static_cast<Rank>(random_.Below(WorldSize(generation_)));
  Call call{.asked = Asked::kJoin, .generation = generation_};
  call.piece = static_cast<size_t>(rank);
  call.client = "impostor";
  Ask(leader_, call,
      [this, join = BuildJoin(rank, call.client)](RequestId request, Host& host, Actions* actions) {
        if (host.leader != nullptr) host.leader->OnJoin(request, join, now_, actions);
      });
}

// One leader lets one client hold a rank.
void Simulation::CheckHolder(const Call& call, int64_t leader_start) {
  const Rank rank = static_cast<Rank>(call.worker >= 0 ? call.worker : call.piece);
  const std::string& holder =
      holders_.try_emplace({leader_start, call.generation, rank}, call.client).first->second;
  if (holder != call.client) Fail("two clients have joined as one rank of a generation");
}

void Simulation::SendPieces(Worker* worker) {
  for (size_t i = 0; i < worker->pieces.size(); ++i) {
    WorkPiece& piece = worker->pieces[i];
    if (piece.acked || now_ < piece.retry_ms) continue;
    piece.retry_ms = now_ + 80;
    const auto& in_sync = store_.in_sync[piece.shard];
    if (in_sync.empty()) continue;
    const PushPiece push = BuildPiece(*worker, piece);
    Call call{worker->rank, Asked::kPush, i, push.key.generation, push.key.step, push.key.attempt};
    call.is_again = std::exchange(piece.is_sent, true);
    Ask(in_sync.front().server, call,
        [this, push](RequestId request, Host& host, Actions* actions) {
          bool keep = false;
          const bool has_room = !FaultsOn() || !random_.OneIn(50);
          if (!has_room) Meet(Met::kNoRoom);
          host.participant->OnPush(request, push, has_room, now_, &keep, actions);
          if (keep && !KeepPiece(&host, push)) refused_pushes_.insert(request);
        });
  }
}

void Simulation::SendCommit(Worker* worker) {
  const Position& position = worker->position;
  CommitRequest commit;
  commit.rank = worker->rank;
  commit.epoch = position.epoch;
  commit.generation = position.generation;
  commit.step = position.committed_step + 1;
  commit.attempt = position.attempt;
  commit.is_load = workload_.IsLoad(commit.step);
  const Workload::Try at{commit.generation, commit.step, commit.attempt};
  if (!commit.is_load) {
    commit.groups = {{{{"lr", static_cast<uint64_t>(commit.step)}}}};
    for (TensorId tensor = 0; tensor < 2; ++tensor) {
      if (workload_.IsAbsent(at, worker->rank, tensor)) commit.absent.push_back(tensor);
    }
  }
  Call call{worker->rank, Asked::kCommit, 0, commit.generation, commit.step, commit.attempt};
  call.is_again = std::exchange(worker->commit_sent, true);
  worker->retry_ms = now_ + 300;
  Ask(leader_, call, [this, commit](RequestId request, Host& host, Actions* actions) {
    if (host.leader != nullptr) host.leader->OnCommitStep(request, commit, now_, actions);
  });
}

void Simulation::TickWorker(Worker* worker) {
  if (is_ending_ || now_ < worker->down_until_ms || worker->rank >= WorldSize(generation_)) return;
  if (worker->generation != generation_) {
    worker->generation = generation_;
    worker->is_joined = false;
    worker->retry_ms = 0;
  }
  if (generation_ == 0) return;
  if (!worker->is_joined) {
    if (now_ >= worker->retry_ms) SendJoin(worker);
    return;
  }
  if (std::exchange(worker->wants_abort, false)) {
    const Position& position = worker->position;
    const AbortRequest abort{position.epoch, position.generation, position.committed_step + 1,
                             position.attempt};
    const Call call{worker->rank, Asked::kAbort};
    Ask(leader_, call, [this, abort](RequestId request, Host& host, Actions* actions) {
      if (host.leader != nullptr) host.leader->OnAbortStep(request, abort, now_, actions);
    });
    return Rejoin(worker);
  }
  SendPieces(worker);
  const bool is_load = workload_.IsLoad(worker->position.committed_step + 1);
  const bool is_pushed = std::all_of(worker->pieces.begin(), worker->pieces.end(),
                                     [](const WorkPiece& piece) { return piece.acked; });
  if (is_load && !is_pushed) return;  // a LOAD is what has been acknowledged
  if (!worker->commit_sent || now_ >= worker->retry_ms) SendCommit(worker);
}

void Simulation::OnAnswer(const Call& call, const Answer& answer, int64_t leader_start) {
  const absl::Status& status = answer.status;
  if (absl::IsAlreadyExists(status) && call.asked != Asked::kJoin) {
    Fail(absl::StrCat("a repeated call was refused: ", status.message()));
  }
  if (call.asked == Asked::kIssue) {
    if (status.ok() && answer.generation_issued > generation_) {
      generation_ = answer.generation_issued;
      wants_generation_ = false;
    }
    return;
  }
  if (call.asked == Asked::kAbort && status.ok()) Meet(Met::kAbort);
  if (call.asked == Asked::kHold && status.ok()) {
    Meet(Met::kHold);
    holds_.push_back({call.step, answer.position.epoch, call.until_ms});
  }
  if (call.asked == Asked::kFlush && status.ok()) {
    Meet(Met::kFlush);
    common_flush_ = std::max(common_flush_, answer.position.committed_step);
  }
  if (call.asked == Asked::kFlush && absl::IsResourceExhausted(status)) Meet(Met::kFlushFailed);
  if (call.asked == Asked::kJoin && status.ok()) CheckHolder(call, leader_start);
  if (call.asked == Asked::kJoin && absl::IsAlreadyExists(status)) Meet(Met::kRankContested);
  // A LOAD is not committed before its pushes have succeeded: only these can learn of damage.
  const bool is_load_push = call.asked == Asked::kPush && workload_.IsLoad(call.step);
  if (call.asked != Asked::kPush || is_load_push) NoteDamage(status);
  if (call.worker < 0) return;
  Worker& worker = workers_[call.worker];
  if (call.life != worker.life) return;
  if (call.asked == Asked::kJoin) return OnJoined(call, answer, &worker);
  if (call.asked == Asked::kPush) return OnPushed(call, answer, &worker);
  if (call.asked == Asked::kCommit) return OnCommitted(call, answer, &worker);
}

// An answer of an older epoch says nothing about this one's staged bytes, whatever the attempt.
bool Simulation::IsCurrent(const Call& call, const Answer& answer, const Worker& worker) const {
  return worker.is_joined && answer.position.epoch >= worker.position.epoch &&
         call.generation == worker.position.generation &&
         call.step == worker.position.committed_step + 1 && call.attempt == worker.position.attempt;
}

void Simulation::OnJoined(const Call& call, const Answer& answer, Worker* worker) {
  if (worker->is_joined || call.generation != generation_) return;
  const absl::Status& status = answer.status;
  const Position& before = worker->position;
  if (status.ok()) {
    worker->max_committed = answer.position.committed_step;
    if (before.attempt == answer.position.attempt && before.epoch < answer.position.epoch &&
        before.generation == answer.position.generation &&
        before.committed_step == answer.position.committed_step) {
      Meet(Met::kAttemptCarriedOn);
    }
    StartStep(worker, answer.position);
  } else if (absl::IsFailedPrecondition(status) || absl::IsAlreadyExists(status)) {
    wants_generation_ = true;
    worker->retry_ms = now_ + 50;
  } else if (absl::IsDataLoss(status) && spec_->level != Level::kMemory &&
             status.message() != kDamageText) {
    Fail(std::string(status.message()));
  } else {
    worker->retry_ms = now_ + 20;
  }
}

void Simulation::OnPushed(const Call& call, const Answer& answer, Worker* worker) {
  if (!IsCurrent(call, answer, *worker) || call.piece >= worker->pieces.size()) return;
  const absl::Status& status = answer.status;
  if (status.ok()) {
    if (call.is_again) Meet(Met::kPushRepeated);
    worker->pieces[call.piece].acked = answer.position.epoch == worker->position.epoch;
  } else if (absl::IsAborted(status) || absl::IsFailedPrecondition(status)) {
    Rejoin(worker);
  } else {
    worker->pieces[call.piece].retry_ms = now_ + 10;
    // A recovery opens a job without room: a new attempt asks for it again.
    if (absl::IsResourceExhausted(status)) worker->wants_abort |= ++worker->refusals > 5;
  }
}

void Simulation::MeetDecision(const DecisionRecord& decision) {
  if (decision.kind == DecisionKind::kApply) Meet(Met::kApply);
  if (decision.kind == DecisionKind::kSkip) Meet(Met::kSkip);
  if (decision.kind == DecisionKind::kLoad && decision.step > 0) Meet(Met::kLaterLoad);
  const auto& untouched = decision.untouched;
  const bool is_absent = std::find(untouched.begin(), untouched.end(), 1) != untouched.end();
  if (decision.kind == DecisionKind::kApply && is_absent) Meet(Met::kAbsent);
  if (decision.attempt > 1) Meet(Met::kLaterAttempt);
}

void Simulation::OnCommitted(const Call& call, const Answer& answer, Worker* worker) {
  const bool is_current = IsCurrent(call, answer, *worker);
  if (!answer.status.ok()) {
    if (ShardOf(answer.status).has_value()) Meet(Met::kFirstLoadRefused);
    if (!is_current) return;
    if (absl::IsAborted(answer.status) || absl::IsFailedPrecondition(answer.status)) {
      return Rejoin(worker);
    }
    worker->retry_ms = now_ + 20;
    return;
  }
  oracle_->Acknowledge(answer.decision, answer.position.epoch);
  result_.acknowledged_steps = oracle_->acknowledged_step() + 1;
  MeetDecision(*answer.decision);
  if (call.is_again) Meet(Met::kCommitAskedAgain);
  if (!is_current) return;
  worker->max_committed = std::max(worker->max_committed, answer.decision->step);
  if (answer.position.committed_step == answer.decision->step &&
      answer.position.generation == worker->position.generation) {
    StartStep(worker, answer.position);
  } else {
    Rejoin(worker);
  }
  if (random_.OneIn(3)) PullSome(answer.decision->step);
  if (!FaultsOn() || !random_.OneIn(8)) return;
  const int64_t until_ms = now_ + (random_.OneIn(3) ? 400 : 60);  // a copy's timeout is between
  Call hold{.asked = Asked::kHold, .step = answer.decision->step, .until_ms = until_ms};
  Ask(leader_, hold, [this, hold](RequestId request, Host& host, Actions* actions) {
    if (host.leader == nullptr) return;
    host.leader->OnHold(request, std::to_string(request), hold.step, hold.until_ms, now_, actions);
  });
}

void Simulation::PullSome(int64_t version) {
  const ShardId shard = static_cast<ShardId>(random_.Below(spec_->shards.size()));
  if (store_.in_sync[shard].empty()) return;
  Ask(store_.in_sync[shard].front().server, Call{-1, Asked::kPull},
      [this, shard, version](RequestId request, Host& host, Actions* actions) {
        host.participant->OnPull(request, shard, version, now_, actions);
      });
}

void Simulation::TickOperator() {
  if (wants_generation_ && now_ >= generation_retry_ms_) {
    generation_retry_ms_ = now_ + 150;
    const JoinRequest join{.rank = 0, .world_size = most_workers_};
    Ask(leader_, Call{-1, Asked::kIssue},
        [this, join](RequestId request, Host& host, Actions* actions) {
          if (host.leader != nullptr) host.leader->OnJoin(request, join, now_, actions);
        });
  }
  if (random_.OneIn(20)) AskForFlush();
  if (spec_->level != Level::kMemory) return;
  FindCommonFlush();
  if (now_ >= rollback_retry_ms_) TickRollback();
}

void Simulation::AskForFlush() {
  Ask(leader_, Call{-1, Asked::kFlush}, [this](RequestId request, Host& host, Actions* actions) {
    if (host.leader != nullptr) host.leader->OnFlush(request, now_, actions);
  });
}

void Simulation::FindCommonFlush() {
  for (const Disk::Flush& flush : hosts_[0].disk.flushes) {
    const bool is_common = std::all_of(hosts_.begin(), hosts_.end(), [&](const Host& host) {
      return host.shards.empty() ||
             std::any_of(host.disk.flushes.begin(), host.disk.flushes.end(),
                         [&](const auto& other) { return other.id.decision == flush.id.decision; });
    });
    if (is_common) common_flush_ = std::max(common_flush_, flush.id.step);
  }
}

// Level MEMORY: whoever finds the job lost takes the newest rollback it offers.
void Simulation::TickRollback() {
  const auto& leader = hosts_[leader_].leader;
  if (leader == nullptr) return;
  const JobStatusReport status = leader->Status();
  const auto accept = [this](int64_t to_step) {
    Ask(leader_, Call{-1, Asked::kRollback},
        [this, to_step](RequestId request, Host& host, Actions* actions) {
          if (host.leader != nullptr)
            host.leader->OnAcceptRollback(request, to_step, now_, actions);
        });
  };
  const bool all_up =
      std::all_of(hosts_.begin(), hosts_.end(), [](const Host& host) { return host.is_up; });
  if (status.serving || !all_up) {
    stuck_since_ms_ = now_;
    if (!status.serving || FaultsOn()) return;
    // A worker may have seen steps of before a rollback that it was not there for.
    accept(status.position.committed_step);
    rollback_retry_ms_ = now_ + 500;
    return;
  }
  rollback_retry_ms_ = now_ + 100;
  const bool is_offered = status.has_lost_memory && !status.rollback_offers.empty();
  if (is_offered) return accept(status.rollback_offers.front().step);
  if (now_ - stuck_since_ms_ <= 3000 || FaultsOn()) return;
  if (!status.has_lost_memory)
    return Fail(
        absl::StrCat("the job stands still, and no server lost its memory: ", status.waiting_for));
  FindLost();
}

// The job stands still for good: right only if something may be lost and nothing can be restored.
void Simulation::FindLost() {
  result_.is_lost = true;
  if (store_.formed == 0) return Fail("a job that nobody has joined is lost");
  for (const auto& copies : store_.in_sync) {
    for (const Copy& copy : copies) {
      const Host& host = hosts_[copy.server];
      if (host.participant->incarnation() != copy.incarnation) continue;
      if (host.participant->prepared() == nullptr && host.participant->last_applied() == nullptr) {
        return Fail("a job is lost that was never loaded");
      }
    }
  }
  if (common_flush_ != kLoading) Fail("a job is lost of which every server had a flush");
}

}  // namespace orlop::step
