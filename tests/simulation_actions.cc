// The shell around the step machines of a simulated server: carries out each action that they ask
// for.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/step/actions.h"
#include "server/step/identity.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/messages.h"
#include "server/step/participant.h"
#include "tests/oracle.h"
#include "tests/simulation.h"
#include "tests/simulator.h"

namespace orlop::step {

void Simulation::Perform(ServerId server, Actions* actions) {
  for (Action& action : *actions) {
    std::visit([&](auto& content) { Do(server, content); }, action);
  }
  if (hosts_[server].is_up && hosts_[server].participant->stopped()) Exit(server);
}

void Simulation::Exit(ServerId server) {
  Host& host = hosts_[server];
  ++host.life;
  host.is_up = false;
  host.participant.reset();
  host.leader.reset();
  const int life = host.life;
  At(20 + random_.Below(200), [this, server, life] {
    if (hosts_[server].life == life) Start(server);
  });
}

void Simulation::Do(ServerId server, Send& action) {
  auto message = std::make_shared<const Message>(std::move(action.message));
  const ServerId to = action.to;
  if (const Prepare* prepare = std::get_if<Prepare>(message.get())) {
    OnPrepareSent(server, to, *prepare);
  } else if (const OpenJob* open = std::get_if<OpenJob>(message.get())) {
    if (open->generation > store_.formed)
      Fail("a server hears of a generation that is not in the record");
  } else if (std::holds_alternative<Discard>(*message)) {
    Meet(Met::kDiscard);
  } else if (const SealReply* reply = std::get_if<SealReply>(message.get())) {
    const bool tells_failure = absl::IsResourceExhausted(reply->status);
    if (tells_failure && FaultsOn() && random_.OneIn(3)) return Meet(Met::kFailureLost);
  }
  Carry([this, server, to, message] { Deliver(server, to, *message); });
}

void Simulation::OnPrepareSent(ServerId from, ServerId to, const Prepare& prepare) {
  hosts_[from].decided_step = prepare.decision->step;
  hosts_[from].decided_epoch = prepare.epoch;
  if (prepare.decision->epoch < prepare.epoch) Meet(Met::kPreparedAgain);
  CrashSoon(random_.OneIn(2) ? from : to, 1 + random_.Below(20));
}

// The moments that matter most are short: a crash is drawn for each.
void Simulation::CrashSoon(ServerId server, int64_t delay_ms) {
  if (!FaultsOn() || !random_.OneIn(30)) return;
  OnHost(server, delay_ms, [this, server](Host&) {
    if (MayLose(server)) Crash(server, false);
  });
}

void Simulation::Deliver(ServerId from, ServerId to, const Message& message) {
  Host& host = hosts_[to];
  if (!host.is_up) return;
  Actions actions;
  if (ForLeader(message)) {
    if (host.leader == nullptr) return;
    host.leader->OnMessage(from, message, now_, &actions);
    CheckReason(message, actions);
  } else {
    host.participant->OnMessage(from, message, now_, &actions);
  }
  Perform(to, &actions);
}

// Every CommitStep that a failure ends learns why.
void Simulation::CheckReason(const Message& message, const Actions& actions) {
  absl::Status why;
  if (const SealReply* reply = std::get_if<SealReply>(&message)) why = reply->status;
  if (const Prepared* reply = std::get_if<Prepared>(&message)) why = reply->status;
  if (why.ok()) return;
  for (const Action& action : actions) {
    const Answer* answer = std::get_if<Answer>(&action);
    if (answer == nullptr || answer->status.ok()) continue;
    const auto call = calls_.find(answer->request);
    if (call == calls_.end() || call->second.asked != Asked::kCommit) continue;
    if (answer->status.message().find(why.message()) == std::string::npos) {
      Fail(absl::StrCat("a CommitStep does not learn why its attempt failed: ", why.message()));
    }
  }
}

void Simulation::Do(ServerId server, Answer& action) {
  if (refused_pushes_.erase(action.request) > 0 && action.status.ok()) {
    action.status = absl::ResourceExhaustedError("the piece cannot be kept");
  }
  Carry([this, answer = std::move(action), leader_start = hosts_[server].leader_start] {
    const auto at = calls_.find(answer.request);
    if (at == calls_.end()) return;
    Call call = at->second;
    calls_.erase(at);
    OnAnswer(call, answer, leader_start);
  });
}

void Simulation::Do(ServerId server, PersistEpoch& action) {
  const int64_t epoch = action.epoch;
  Sync(
      server, [epoch](Disk* disk) { disk->epoch = std::max(disk->epoch, epoch); },
      [this, server, epoch](Host& host) {
        Actions actions;
        host.participant->OnEpochDurable(epoch, now_, &actions);
        Perform(server, &actions);
      });
}

void Simulation::Do(ServerId server, PersistDecision& action) {
  const DecisionPtr decision = action.decision;
  Disk::Entry entry;
  entry.record.decision = decision;
  entry.staged = hosts_[server].staged;
  const bool fails = FaultsOn() && random_.OneIn(40);
  const bool is_written = !fails || random_.OneIn(2);
  Sync(
      server,
      [entry, is_written](Disk* disk) {
        if (is_written) disk->journal.push_back(entry);
      },
      [this, server, decision, fails](Host& host) {
        Actions actions;
        if (fails) {
          Meet(Met::kPrepareFailed);
          host.participant->OnPrepareFailed(decision->identity,
                                            absl::DataLossError("the journal cannot be written"),
                                            now_, &actions);
        } else {
          host.participant->OnDecisionDurable(decision->identity, now_, &actions);
        }
        Perform(server, &actions);
      });
}

void Simulation::Do(ServerId server, PersistDiscard& action) {
  const int64_t step = action.step, attempt = action.attempt;
  Sync(
      server,
      [step, attempt](Disk* disk) {
        disk->journal.push_back({{JournalRecord::Type::kDiscarded, nullptr, step, attempt}, {}});
      },
      [this, server, step, attempt](Host& host) {
        Actions actions;
        host.participant->OnDiscardDurable(step, attempt, now_, &actions);
        Perform(server, &actions);
      });
}

void Simulation::Do(ServerId server, TakeLayout& action) {
  const bool is_refused = FaultsOn() && random_.OneIn(12);
  const Digest layout = action.layout->digest;
  // Making room spills what is there to the disk now and then.
  const int64_t delay_ms = 1 + random_.Below(FaultsOn() && random_.OneIn(6) ? 400 : 6);
  OnHost(server, delay_ms, [this, server, layout, is_refused](Host& host) {
    for (Staged& staged : host.staged) staged = {};
    host.room = is_refused ? Digest{} : layout;
    if (is_refused) Meet(Met::kLayoutRefused);
    if (!is_refused && host.refused == layout) Meet(Met::kLayoutTakenLater);
    if (is_refused) host.refused = layout;
    Actions actions;
    host.participant->OnLayoutTaken(
        layout,
        is_refused ? absl::ResourceExhaustedError("no room for the layout") : absl::OkStatus(),
        now_, &actions);
    Perform(server, &actions);
  });
}

bool Simulation::KeepPiece(Host* host, const PushPiece& piece) {
  if (host->room != layouts_[piece.key.generation]) {
    Fail("a piece was kept where there is no room for its layout");
  }
  std::erase(host->refused_pieces, piece.key);
  if (!FaultsOn() || !stage_.OneIn(60)) return true;
  Meet(Met::kPieceRefused);
  host->refused_pieces.push_back(piece.key);
  return false;
}

bool Simulation::HasRefused(const Host& host, ShardId shard) const {
  const std::vector<StagedPiece> pieces = host.participant->PiecesOf(shard);
  return std::any_of(pieces.begin(), pieces.end(), [&](const StagedPiece& piece) {
    return std::find(host.refused_pieces.begin(), host.refused_pieces.end(), piece.key) !=
           host.refused_pieces.end();
  });
}

// Sums what the participant says is staged: the bytes follow from the keys of the pieces.
Staged Simulation::Reduce(const Host& host, const StageShard& action, ShardStaged* result) const {
  const ShardSpec& shard = spec_->shards[action.shard];
  Staged staged{action.step, action.attempt, action.is_load, Values(shard.range.count(), 0)};
  DigestBuilder digest;
  for (const StagedPiece& piece : host.participant->PiecesOf(action.shard)) {
    const Workload::Try at{piece.key.generation, piece.key.step, piece.key.attempt};
    for (uint64_t i = 0; i < shard.range.count(); ++i) {
      const auto element = static_cast<int64_t>(shard.range.begin + i);
      if (action.is_load) {
        staged.gradient[i] = workload_.LoadedValue(at, shard.tensor, element);
      } else if (Oracle::Contributes(*spec_, WorldSize(at.generation), piece.key.rank, shard.tensor,
                                     element)) {
        staged.gradient[i] += workload_.Gradient(at, piece.key.rank, shard.tensor, element);
      }
    }
    const bool is_bad = shard.tensor == 0 && piece.key.rank == 0 && shard.range.begin == 0;
    if (is_bad && !action.is_load && workload_.IsNonFinite(at)) ++result->non_finite_count;
  }
  for (uint64_t value : staged.gradient) {
    digest.Add(value);
    if (!action.is_load) result->sum_of_squares += static_cast<double>(value) * value;
  }
  result->shard = action.shard;
  result->digest = digest.Finish();
  return staged;
}

void Simulation::Do(ServerId server, StageShard& action) {
  const bool fails = FaultsOn() && random_.OneIn(60);
  OnHost(server, 1 + random_.Below(4), [this, server, action, fails](Host& host) {
    if (fails || HasRefused(host, action.shard)) {
      Meet(Met::kStagingFailed);
      Actions actions;
      host.participant->OnShardStagingFailed(action.shard, action.step, action.attempt,
                                             absl::ResourceExhaustedError("no room for the sum"),
                                             now_, &actions);
      return Perform(server, &actions);
    }
    ShardStaged result;
    Staged staged = Reduce(host, action, &result);
    Staged& slot = host.staged[Local(host, action.shard)];
    if (slot.step <= action.step) slot = std::move(staged);
    Actions actions;
    host.participant->OnShardStaged(action.step, action.attempt, result, now_, &actions);
    Perform(server, &actions);
  });
}

void Simulation::Do(ServerId server, DropStaged& action) {
  for (Staged& staged : hosts_[server].staged) {
    if (staged.step == action.step && staged.attempt <= action.attempt) staged = {};
  }
}

void Simulation::ApplyTo(Values* values, ShardId id, const DecisionRecord& decision,
                         const Staged& staged) {
  const ShardSpec& shard = spec_->shards[id];
  const bool is_here = staged.step == decision.step && staged.attempt == decision.attempt;
  if (decision.kind == DecisionKind::kSkip || decision.untouched[shard.tensor]) return;
  if (decision.kind == DecisionKind::kLoad) {
    if (is_here) *values = staged.gradient;
    return;
  }
  int64_t count = 0;
  double sum_of_squares = 0;
  std::copy_n(decision.scalars.data() + shard.tensor * sizeof(count), sizeof(count),
              reinterpret_cast<char*>(&count));
  std::copy_n(decision.scalars.data() + spec_->tensors.size() * sizeof(count),
              sizeof(sum_of_squares), reinterpret_cast<char*>(&sum_of_squares));
  for (uint64_t i = 0; i < shard.range.count(); ++i) {
    (*values)[i] = Workload::Update((*values)[i], is_here ? staged.gradient[i] : 0, count,
                                    sum_of_squares, decision.step);
  }
}

void Simulation::Do(ServerId server, StartApply& action) {
  oracle_->Observe(action.decision);
  for (const Held& held : holds_) {  // only a recovery ends a hold before its time
    if (held.step == action.decision->step - 1 && now_ < held.until_ms &&
        held.epoch == hosts_[server].participant->epoch()) {
      Fail("a step was applied while the version before it was held");
    }
  }
  OnHost(server, 1 + random_.Below(10), [this, server, action](Host& host) {
    if (random_.OneIn(80) && MayDamage(server)) return Damage(server, action);
    const int local = Local(host, action.shard);
    ApplyTo(&host.values[local], action.shard, *action.decision, host.staged[local]);
    host.staged[local] = {};
    Actions actions;
    host.participant->OnShardApplied(action.shard, action.decision->step, now_, &actions);
    const DecisionPtr last = host.participant->last_applied();
    if (IsJournaled(spec_->level) && last != nullptr &&
        last->identity == action.decision->identity) {
      // A mark that nobody waits for.
      Sync(
          server,
          [last](Disk* disk) {
            disk->journal.push_back({{JournalRecord::Type::kApplied, last, 0, 0}, {}});
          },
          [](Host&) {});
    }
    Perform(server, &actions);
  });
}

// The bytes of the shard are neither the old version nor the new one.
void Simulation::Damage(ServerId server, const StartApply& action) {
  Meet(Met::kDamage);
  Host& host = hosts_[server];
  for (uint64_t& value : host.values[Local(host, action.shard)]) value = MixBits(value, 99);
  Actions actions;
  host.participant->OnShardDamaged(action.shard, action.decision->step,
                                   absl::DataLossError(kDamageText), now_, &actions);
  Perform(server, &actions);
}

void Simulation::Do(ServerId server, ForwardBytes& action) {
  Carry([this, server, to = action.to, forward = action.forward] {
    DeliverForward(server, to, forward);
  });
}

void Simulation::DeliverForward(ServerId from, ServerId to, Forward forward) {
  if (!hosts_[to].is_up) return;
  Actions actions;
  bool keep = false;
  hosts_[to].participant->OnForward(from, forward, !random_.OneIn(50), now_, &keep, &actions);
  if (keep) KeepPiece(&hosts_[to], forward.piece);
  Perform(to, &actions);
}

void Simulation::Do(ServerId server, Serve& action) {
  Host& host = hosts_[server];
  int64_t step = 0;
  Digest decision;
  host.participant->AppliedOf(action.shard, &step, &decision).IgnoreError();
  Meet(Met::kPull);
  if (!host.participant->damage().ok()) Meet(Met::kDamageBesideOthers);
  if (step != action.version) Fail("a pull was served another version than it asked for");
  oracle_->CheckShard(action.shard, step, decision, host.values[Local(host, action.shard)], "pull");
  OnHost(server, random_.Below(30), [this, server, request = action.request](Host& served) {
    Actions actions;
    served.participant->OnPullDone(request, now_, &actions);
    Perform(server, &actions);
  });
}

void Simulation::Do(ServerId server, FetchShard& action) {
  OnHost(server, 5 + random_.Below(40), [this, server, action](Host& host) {
    Host& source = hosts_[action.source];
    int64_t step = 0;
    Digest decision;
    absl::Status status = absl::UnavailableError("the source is down");
    if (source.is_up) {
      status = source.participant->AppliedOf(action.shard, &step, &decision);
      if (status.ok() && decision != action.decision->identity) {
        status = absl::FailedPreconditionError("the source is at another step");
      }
    }
    if (status.ok()) {
      host.values[Local(host, action.shard)] = source.values[Local(source, action.shard)];
    }
    const auto report = [this, server, action, status](Host& later) {
      Actions actions;
      later.participant->OnShardFetched(action.shard, action.decision->identity, status, now_,
                                        &actions);
      Perform(server, &actions);
    };
    if (!status.ok() || !IsJournaled(spec_->level)) return report(host);
    // The journal starts anew: from this shard, and others that are at the same step already.
    std::vector<ShardReport> now = host.participant->Image().shards;
    now[Local(host, action.shard)] = {action.shard, action.decision->step,
                                      action.decision->identity};
    Sync(
        server,
        [now, values = host.values, decision = action.decision](Disk* disk) {
          disk->journal.clear();
          disk->base_decision = decision;
          disk->base.resize(now.size());
          disk->base_values.resize(now.size());
          for (size_t i = 0; i < now.size(); ++i) {
            if (now[i].applied != decision->identity) continue;
            disk->base[i] = now[i];
            disk->base_values[i] = values[i];
          }
        },
        report);
  });
}

void Simulation::Do(ServerId server, LoadFlush& action) {
  OnHost(server, 10, [this, server, action](Host& host) {
    absl::Status status = absl::DataLossError("no such flush");
    DecisionPtr decision;
    for (const Disk::Flush& flush : host.disk.flushes) {
      if (flush.id.decision != action.decision) continue;
      host.values = flush.values;
      host.staged.assign(host.shards.size(), {});
      decision = flush.decision;
      status = absl::OkStatus();
    }
    Actions actions;
    host.participant->OnFlushRestored(action.decision, decision, status, now_, &actions);
    Perform(server, &actions);
  });
}

namespace {

// Keeps the newest flush of each of these steps.
void Keep(std::vector<int64_t> steps, std::vector<Disk::Flush>* flushes) {
  std::erase_if(*flushes,
                [&](const Disk::Flush& flush) { return std::erase(steps, flush.id.step) == 0; });
}

}  // namespace

// The bytes of a running job are read at the end of the write: nothing may change them meanwhile.
void Simulation::Do(ServerId server, WriteFlush& action) {
  Disk::CleanStop stop{hosts_[server].participant->Image(), {}, hosts_[server].staged};
  const bool is_empty = stop.image.last_applied == nullptr && stop.image.prepared == nullptr;
  if (is_empty && !hosts_[server].disk.flushes.empty())
    return Fail("a flush of nothing takes the place of one that can be rolled back to");
  const bool fails = !action.is_stop && FaultsOn() && random_.OneIn(20);
  const bool is_trimmed = !random_.OneIn(10);  // the disk may prevent it
  const bool is_short = shortage_.OneIn(4);
  std::vector<Disk::Flush>& flushes = hosts_[server].disk.flushes;
  if (is_short && flushes.size() > action.needed.size()) Meet(Met::kOldFlushErased);
  if (is_short) Keep(action.needed, &flushes);
  const auto write = [this, server, stop, action, is_trimmed](Disk* disk) {
    const std::vector<Values>& values = hosts_[server].values;
    RecoverReport::Flush id;
    if (FlushOf(stop.image, &id)) {
      disk->flushes.insert(disk->flushes.begin(), {id, stop.image.last_applied, values});
      std::vector<int64_t> steps = action.keep;
      if (std::find(steps.begin(), steps.end(), id.step) == steps.end()) steps.push_back(id.step);
      if (is_trimmed) Keep(std::move(steps), &disk->flushes);
    }
    if (!action.is_stop) return;
    disk->clean_stop = stop;
    disk->clean_stop->values = values;
  };
  const auto end = [this, server, fails, is_short](Host& host) {
    Actions actions;
    host.participant->OnFlushed(
        fails ? absl::ResourceExhaustedError("no space for the flush") : absl::OkStatus(), is_short,
        now_, &actions);
    Perform(server, &actions);
  };
  if (fails) return OnHost(server, 1 + random_.Below(50), end);
  OnHost(server, action.is_stop ? 0 : random_.Below(50),
         [this, server, write, end](Host&) { Sync(server, write, end); });
}

void Simulation::Do(ServerId server, KeepFlushes& action) {
  if (random_.OneIn(10)) return;
  Sync(
      server, [steps = action.keep](Disk* disk) { Keep(steps, &disk->flushes); }, [](Host&) {});
}

void Simulation::MeetRecord(const JobRecord& record) {
  if (record.formed != store_.formed && store_.formed > 0) {
    Meet(Met::kNewGeneration);
    const bool same = record.layout->world_size() == store_.layout->world_size();
    if (!same) Meet(Met::kOtherWorldSize);
  }
  if (record.formed != store_.formed && record.layout->world_size() >= 3) Meet(Met::kThreeWorkers);
  size_t before = 0, after = 0;
  for (const auto& copies : store_.in_sync) before += copies.size();
  for (const auto& copies : record.in_sync) after += copies.size();
  if (after < before) Meet(Met::kCopyLeftOut);
  if (after > before && before > 0) Meet(Met::kCopyCameBack);
}

// The coordination store: it survives everything, and compares before it sets.
void Simulation::Do(ServerId server, PersistRecord& action) {
  const int life = hosts_[server].life;
  CrashSoon(server, 1 + random_.Below(10));
  At(2 + random_.Below(8), [this, server, life, record = std::move(action.record)] {
    if (hosts_[server].life != life && random_.OneIn(2)) return Meet(Met::kRecordLost);
    const bool ok = store_.version == record.version - 1;
    if (ok) {
      const bool is_new = !store_.rolling_back || record.rollback_digest != store_.rollback_digest;
      if (record.rolling_back && is_new) {
        Meet(Met::kRollback);
        if (record.rollback_step < common_flush_)
          Fail("the job goes back behind a flush that all servers had");
        oracle_->RollBack(record.rollback_step, record.rollback_digest, record.epoch);
      }
      if (record.formed != store_.formed) {
        oracle_->AddGeneration(record.formed, record.layout->world_size());
        layouts_[record.formed] = record.layout->digest;
      }
      MeetRecord(record);
      store_ = record;
      result_.epochs = record.epoch;
    }
    Host& host = hosts_[server];
    if (host.life != life || host.leader == nullptr) return;
    Actions actions;
    host.leader->OnRecordPersisted(record.version, ok, now_, &actions);
    Perform(server, &actions);
  });
}

}  // namespace orlop::step
