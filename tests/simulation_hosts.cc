// Servers of the simulation: starts, crashes, clean stops, and what their disks keep.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "server/step/actions.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/leader.h"
#include "server/step/messages.h"
#include "server/step/participant.h"
#include "server/step/requests.h"
#include "tests/oracle.h"
#include "tests/simulation.h"
#include "tests/simulator.h"

namespace orlop::step {

void Simulation::Build() {
  spec_ = std::make_shared<JobSpec>();
  spec_->manifest_digest = {seed_, 1};
  spec_->level = static_cast<Level>(random_.Below(4));
  result_.met[static_cast<size_t>(spec_->level)] = 1;
  const bool is_replicated =
      spec_->level == Level::kReplicated || spec_->level == Level::kReplicatedJournaled;
  const int64_t at_most = random_.OneIn(8) ? 5 : 3;  // the larger, the slower
  spec_->server_count =
      static_cast<int>(is_replicated ? 2 + random_.Below(at_most - 1) : 1 + random_.Below(at_most));
  spec_->tensors = {{"bias", {3}, true}, {"weight", {4, 2}, true}};
  if (stage_.OneIn(3)) {
    Meet(Met::kBuffer);
    spec_->tensors.push_back({"buffer", {2}, false});
  }
  const int copies =
      is_replicated ? static_cast<int>(2 + random_.Below(spec_->server_count - 1)) : 1;
  const uint64_t shard_size = 3 + random_.Below(3);
  for (TensorId tensor = 0; tensor < static_cast<TensorId>(spec_->tensors.size()); ++tensor) {
    const uint64_t total = *ElementCount(spec_->tensors[tensor].shape);
    for (uint64_t s = 0; s < ShardCount(total, shard_size); ++s) {
      ShardSpec shard{tensor, ShardRange(s, total, shard_size), {}};
      const int64_t first = static_cast<int64_t>(spec_->shards.size());
      for (int i = 0; i < copies; ++i) {
        shard.copies.push_back(static_cast<ServerId>((first + i) % spec_->server_count));
      }
      spec_->shards.push_back(std::move(shard));
    }
  }
  workload_ = {seed_, spec_};
  oracle_ = std::make_unique<Oracle>(workload_);
  hosts_.resize(spec_->server_count);
  for (ServerId server = 0; server < spec_->server_count; ++server) {
    for (size_t shard = 0; shard < spec_->shards.size(); ++shard) {
      const auto& placed = spec_->shards[shard].copies;
      if (std::find(placed.begin(), placed.end(), server) == placed.end()) continue;
      hosts_[server].shards.push_back(static_cast<ShardId>(shard));
    }
  }
  most_workers_ = static_cast<int>(random_.OneIn(8) ? kMaxWorkers : 1 + random_.Below(2));
  workers_.resize(most_workers_);
  for (Rank rank = 0; rank < most_workers_; ++rank) workers_[rank].rank = rank;
  loss_percent_ = random_.Below(3) * 4;
  target_step_ = 3 + random_.Below(4);
  result_.description = absl::StrCat(ToString(spec_->level), ", ", spec_->server_count,
                                     " servers, ", copies, " copies, ", most_workers_, " workers");
  if (copies >= 3) Meet(Met::kThreeCopies);
  if (spec_->server_count >= 4) Meet(Met::kFourServers);
}

int64_t Simulation::NetworkDelay() {
  if (!FaultsOn() || !random_.OneIn(40)) return 1 + random_.Below(8);
  Meet(Met::kMessageDelayed);
  return 50 + random_.Below(300);
}

void Simulation::Carry(std::function<void()> deliver, std::function<void()> repeated) {
  if (FaultsOn() && random_.Below(100) < loss_percent_) return Meet(Met::kMessageLost);
  At(NetworkDelay(), deliver);
  if (!FaultsOn() || random_.Below(100) >= loss_percent_) return;
  Meet(Met::kMessageRepeated);
  At(NetworkDelay() + 60, [deliver = std::move(deliver), repeated = std::move(repeated)] {
    if (repeated != nullptr) repeated();
    deliver();
  });
}

int Simulation::Local(const Host& host, ShardId shard) const {
  const auto at = std::lower_bound(host.shards.begin(), host.shards.end(), shard);
  return static_cast<int>(at - host.shards.begin());
}

void Simulation::Start(ServerId server) {
  Host& host = hosts_[server];
  ++host.life;
  host.is_up = true;
  host.is_stopping = false;
  host.unsynced.clear();
  host.values.clear();
  for (ShardId shard : host.shards) host.values.emplace_back(spec_->shards[shard].range.count(), 0);
  host.staged.assign(host.shards.size(), {});
  ParticipantImage image;
  Disk& disk = host.disk;
  if (disk.clean_stop.has_value()) {
    image = disk.clean_stop->image;
    host.values = disk.clean_stop->values;
    host.staged = disk.clean_stop->staged;
    disk.clean_stop.reset();
  } else if (IsJournaled(spec_->level) && disk.incarnation != 0) {
    ReadJournal(&host, &image);
  }
  host.refused_pieces.clear();
  host.room = image.layout;
  host.refused = {};
  image.epoch = disk.epoch;
  image.incarnation = disk.incarnation;
  image.flushes.clear();
  for (const Disk::Flush& flush : disk.flushes) image.flushes.push_back(flush.id);
  if (!image.has_memory) {
    disk.incarnation = ++next_incarnation_;
    disk.journal.clear();
    disk.base.clear();
    disk.base_decision = nullptr;
  }
  host.participant = std::make_unique<Participant>(spec_, server, leader_, image, disk.incarnation,
                                                   ParticipantOptions{60, 40});
  if (server == leader_) StartLeader(server);
}

// State and image of a host as its journal tells them.
void Simulation::ReadJournal(Host* host, ParticipantImage* image) {
  const Disk& disk = host->disk;
  image->has_memory = true;
  for (const ShardReport& shard : disk.base) {
    image->has_memory &= shard.applied == disk.base[0].applied;
  }
  int64_t base_step = disk.base_decision == nullptr ? kLoading : disk.base_decision->step;
  if (!disk.base.empty()) base_step = disk.base[0].applied_step;
  image->last_applied = disk.base_decision;
  image->shards = disk.base;
  if (!disk.base.empty() && image->has_memory) host->values = disk.base_values;
  if (disk.base.empty()) {
    for (ShardId shard : host->shards) image->shards.push_back({shard, kLoading, {}});
  }
  std::vector<JournalRecord> records;
  records.reserve(disk.journal.size());
  for (const Disk::Entry& entry : disk.journal) records.push_back(entry.record);
  const JournalReplay replay = ReplayJournal(records, base_step);
  const auto staged_of = [&](const DecisionPtr& decision) -> const std::vector<Staged>* {
    for (const Disk::Entry& entry : disk.journal) {
      if (entry.record.type == JournalRecord::Type::kPrepared &&
          entry.record.decision->identity == decision->identity) {
        return &entry.staged;
      }
    }
    return nullptr;
  };
  for (const DecisionPtr& decision : replay.applied) {
    const std::vector<Staged>* staged = staged_of(decision);
    for (size_t i = 0; i < host->shards.size() && staged != nullptr; ++i) {
      ApplyTo(&host->values[i], host->shards[i], *decision, (*staged)[i]);
      image->shards[i] = {host->shards[i], decision->step, decision->identity};
    }
    image->last_applied = decision;
  }
  image->prepared = replay.prepared;
  if (replay.prepared != nullptr) host->staged = *staged_of(replay.prepared);
  image->discarded_step = replay.discarded_step;
  image->discarded_attempt = replay.discarded_attempt;
}

void Simulation::StartLeader(ServerId server) {
  leader_ = server;
  hosts_[server].decided_step = kLoading;
  hosts_[server].leader_start = ++leader_starts_;
  hosts_[server].leader = std::make_unique<Leader>(
      spec_, server, store_,
      [](const ScalarInputs& inputs) -> absl::StatusOr<std::string> {
        // Per tensor the count, then the norm: what the stand-in kernel reads.
        std::string scalars;
        for (int64_t count : *inputs.applied_count) {
          scalars.append(reinterpret_cast<const char*>(&count), sizeof(count));
        }
        scalars.append(reinterpret_cast<const char*>(&inputs.sum_of_squares), sizeof(double));
        return scalars;
      },
      LeaderOptions{60, 250, 500});
}

void Simulation::Crash(ServerId server, bool lose_disk) {
  Host& host = hosts_[server];
  // What was written but not synced is there up to some point, by luck.
  const size_t kept = host.unsynced.empty() ? 0 : random_.Below(host.unsynced.size() + 1);
  if (kept < host.unsynced.size()) Meet(Met::kTornWrite);
  for (size_t i = 0; i < kept; ++i) host.unsynced[i](&host.disk);
  host.unsynced.clear();
  MeetCrash(host);
  ++host.life;
  host.is_up = false;
  host.participant.reset();
  host.leader.reset();
  if (lose_disk) {
    host.disk = {};
    Meet(Met::kLostDisk);
  }
  const int life = host.life;
  At(20 + random_.Below(500), [this, server, life] {
    if (hosts_[server].life == life) Start(server);
  });
}

void Simulation::MeetCrash(const Host& host) {
  Meet(Met::kCrash);
  if (host.leader == nullptr) return;
  const JobStatusReport status = host.leader->Status();
  if (!status.serving) return;
  const bool is_decided = host.decided_epoch == status.position.epoch &&
                          host.decided_step > status.position.committed_step;
  Meet(is_decided ? Met::kLeaderCrashDecided : Met::kLeaderCrashUndecided);
}

void Simulation::Stop(ServerId server) {
  Host& host = hosts_[server];
  if (!host.participant->damage().ok()) return;  // a stop would not end
  host.is_stopping = true;
  Meet(Met::kCleanStop);
  if (host.participant->Image().prepared != nullptr) Meet(Met::kStopInStep);
  Actions actions;
  host.participant->OnStop(now_, &actions);
  Perform(server, &actions);
}

void Simulation::Sync(ServerId server, std::function<void(Disk*)> write,
                      std::function<void(Host&)> done) {
  hosts_[server].unsynced.push_back(std::move(write));
  OnHost(server, 5, [done = std::move(done)](Host& host) {  // equal delays keep writes in order
    host.unsynced.front()(&host.disk);
    host.unsynced.erase(host.unsynced.begin());
    done(host);
  });
}

}  // namespace orlop::step
