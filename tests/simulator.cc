#include "tests/simulator.h"

#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/step/actions.h"
#include "server/step/identity.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "tests/simulation.h"

namespace orlop::step {
namespace {

constexpr int64_t kTickMs = 20;
constexpr int64_t kDeadlineMs = 60000;

}  // namespace

// Every copy in sync in its present incarnation, and every host up: the fault that a replicated
// level allows is available again.
bool Simulation::AllInSync() const {
  if (store_.in_sync.size() != spec_->shards.size()) return false;
  for (const Host& host : hosts_) {
    if (!host.is_up || !host.participant->damage().ok()) return false;
  }
  for (size_t shard = 0; shard < spec_->shards.size(); ++shard) {
    if (store_.in_sync[shard].size() != spec_->shards[shard].copies.size()) return false;
    for (const Copy& copy : store_.in_sync[shard]) {
      if (hosts_[copy.server].disk.incarnation != copy.incarnation) return false;
    }
  }
  const auto& leader = hosts_[leader_].leader;
  return leader != nullptr && leader->Status().serving;
}

// A crash that the job's level promises to survive; at MEMORY one that it may have to roll back.
bool Simulation::MayLose(ServerId server) const {
  if (!hosts_[server].is_up) return false;
  switch (spec_->level) {
    case Level::kMemory:
      return store_.epoch > 2 && !hosts_[server].disk.flushes.empty();
    case Level::kReplicated:
      return AllInSync();
    default:
      return true;
  }
}

// Damage that a new process heals: from its journal, or at MEMORY by a rollback.
bool Simulation::MayDamage(ServerId server) const {
  if (!FaultsOn() || hosts_[server].is_stopping || spec_->level == Level::kReplicated) return false;
  return MayLose(server);
}

void Simulation::NoteDamage(const absl::Status& status) {
  is_damage_told_ |= absl::IsDataLoss(status) && status.message() == kDamageText;
}

// Who learns of damage starts the servers that have it anew.
void Simulation::HealDamage() {
  const auto& leader = hosts_[leader_].leader;
  if (leader != nullptr) {  // the operator looks at a job that does not serve, or has no workers
    const JobStatusReport status = leader->Status();
    const bool is_seen = status.waiting_for.find(kDamageText) != std::string::npos;
    is_damage_told_ |= is_seen && (!status.serving || is_ending_);
  }
  if (!std::exchange(is_damage_told_, false)) return;
  for (ServerId server = 0; server < spec_->server_count; ++server) {
    if (!hosts_[server].is_up || hosts_[server].participant->damage().ok()) continue;
    Meet(Met::kDamageTold);
    Crash(server, false);
  }
}

void Simulation::LosePower() {
  Meet(Met::kPowerLoss);
  for (ServerId server = 0; server < spec_->server_count; ++server) {
    if (hosts_[server].is_up) Crash(server, false);
  }
}

// At MEMORY a crash often loses the whole job: flushes are made common first.
void Simulation::StopAll() {
  for (ServerId server = 0; server < spec_->server_count; ++server) {
    if (hosts_[server].is_up) Stop(server);
  }
}

void Simulation::CrashWorker(Worker* worker) {
  Meet(Met::kWorkerCrash);
  const int life = worker->life + 1;
  *worker = {.rank = worker->rank, .life = life, .down_until_ms = now_ + 20 + random_.Below(200)};
  wants_generation_ = true;
}

void Simulation::Fault() {
  const ServerId server = static_cast<ServerId>(random_.Below(spec_->server_count));
  const bool is_replicated =
      spec_->level == Level::kReplicated || spec_->level == Level::kReplicatedJournaled;
  switch (random_.Below(10)) {
    case 0:
    case 1:
    case 2:
      if (spec_->level == Level::kMemory && !random_.OneIn(4)) return StopAll();
      // Also while the job is LOADING, but seldom: a single server may then be lost for good.
      if (spec_->level == Level::kMemory
              ? hosts_[server].is_up && (store_.epoch > 2 || (store_.opened && random_.OneIn(4)))
              : MayLose(server)) {
        Crash(server, false);
      }
      return;
    case 3:
      if (spec_->level == Level::kMemory || !AllInSync()) return;
      if (spec_->level == Level::kReplicated) return Crash(server, random_.OneIn(2));
      if (spec_->level == Level::kJournaled || random_.OneIn(2)) return LosePower();
      return Crash(server, true);
    case 4:
      if (hosts_[server].is_up) Stop(server);
      return;
    case 5:
      for (Worker& worker : workers_) worker.wants_abort |= worker.is_joined;
      return;
    case 6:
      wants_generation_ = true;
      return;
    case 7:  // another server takes over, rightly or not
      if (!is_replicated || !hosts_[server].is_up || server == leader_) return;
      Meet(Met::kTakeover);
      return StartLeader(server);
    case 8:
      return CrashWorker(&workers_[random_.Below(most_workers_)]);
    default:
      return ClaimARank();
  }
}

void Simulation::Tick() {
  for (ServerId server = 0; server < spec_->server_count; ++server) {
    Host& host = hosts_[server];
    if (!host.is_up) continue;
    Actions actions;
    host.participant->OnTick(now_, &actions);
    if (host.leader != nullptr) host.leader->OnTick(now_, &actions);
    Perform(server, &actions);
  }
  // The coordination store names leader_: one that lost a race there begins again from the record.
  for (ServerId server = 0; server < spec_->server_count; ++server) {
    Host& host = hosts_[server];
    if (host.leader == nullptr || !host.leader->deposed()) continue;
    Meet(Met::kDeposed);
    host.leader.reset();
    if (server == leader_) StartLeader(server);
  }
  for (Worker& worker : workers_) TickWorker(&worker);
  TickOperator();
  HealDamage();
  if (FaultsOn() && random_.OneIn(9)) Fault();
  At(kTickMs, [this] { Tick(); });
}

bool Simulation::IsFinished() const {
  return !FaultsOn() && oracle_->acknowledged_step() >= target_step_;
}

// The job serves and every copy has applied what is committed.
bool Simulation::IsAtRest() const {
  if (!AllInSync()) return false;
  const int64_t committed = hosts_[leader_].leader->Status().position.committed_step;
  for (const Host& host : hosts_) {
    for (ShardId shard : host.shards) {
      int64_t step = 0;
      Digest decision;
      host.participant->AppliedOf(shard, &step, &decision).IgnoreError();
      if (step != committed) return false;
    }
  }
  return true;
}

// Every in-sync copy of a job that has come to rest holds what the replay says.
void Simulation::CheckFinal() {
  for (size_t shard = 0; shard < spec_->shards.size(); ++shard) {
    if (store_.in_sync[shard].empty()) Fail("a shard ended without an in-sync copy");
    for (const Copy& copy : store_.in_sync[shard]) {
      Host& host = hosts_[copy.server];
      if (!host.is_up || host.disk.incarnation != copy.incarnation) continue;
      const ShardId id = static_cast<ShardId>(shard);
      int64_t step = 0;
      Digest decision;
      host.participant->AppliedOf(id, &step, &decision).IgnoreError();
      oracle_->CheckShard(id, step, decision, host.values[Local(host, id)], "final");
    }
  }
}

SimulationResult Simulation::Run() {
  Build();
  for (ServerId server = 0; server < spec_->server_count; ++server) Start(server);
  At(0, [this] { Tick(); });
  int64_t rest_until_ms = 0;
  while (!events_.empty() && result_.failure.empty() && oracle_->failure().empty()) {
    Event event = std::move(const_cast<Event&>(events_.top()));
    events_.pop();
    now_ = event.at;
    event.run();
    ++result_.events;
    if (result_.is_lost) {
      Meet(Met::kJobLost);
      break;
    }
    if (rest_until_ms == 0 && IsFinished()) {
      rest_until_ms = now_ + 200;
      is_ending_ = true;
    }
    if (rest_until_ms > 0 && now_ >= rest_until_ms) {
      if (IsAtRest()) break;
      rest_until_ms = now_ + 50;
    }
    if (now_ > kDeadlineMs) {
      const auto& leader = hosts_[leader_].leader;
      Fail(absl::StrCat("no progress at step ", oracle_->acknowledged_step(), ": ",
                        leader == nullptr ? "no leader" : leader->Status().waiting_for));
    }
  }
  if (result_.failure.empty() && oracle_->failure().empty() && !result_.is_lost) CheckFinal();
  if (result_.failure.empty()) result_.failure = oracle_->failure();
  result_.ok = result_.failure.empty();
  return result_;
}

SimulationResult RunSchedule(uint64_t seed) { return Simulation(seed).Run(); }

}  // namespace orlop::step
