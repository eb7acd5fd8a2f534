// The part of Participant that handles epochs, decisions, start and stop. Pushes and pulls are in
// participant_staging.cc.
#include "server/step/participant.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/checksum.h"
#include "server/step/actions.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/messages.h"
#include "server/step/recovery.h"

namespace orlop::step {
namespace {

// A server keeps this many flushes of a job, and the newest one that all servers have.
constexpr size_t kKeptFlushes = 2;

}  // namespace

JournalReplay ReplayJournal(const std::vector<JournalRecord>& journal, int64_t base_step) {
  JournalReplay replay;
  const auto commit = [&](const DecisionPtr& decision) {
    const int64_t next = base_step + static_cast<int64_t>(replay.applied.size()) + 1;
    if (decision->step == next) replay.applied.push_back(decision);
  };
  for (const JournalRecord& record : journal) {
    switch (record.type) {
      case JournalRecord::Type::kPrepared:
        // A server prepares a step only after the step before was committed and applied.
        if (replay.prepared != nullptr && record.decision->step > replay.prepared->step) {
          commit(replay.prepared);
        }
        replay.prepared = record.decision;
        break;
      case JournalRecord::Type::kApplied:
        commit(record.decision);
        if (replay.prepared != nullptr && replay.prepared->identity == record.decision->identity) {
          replay.prepared = nullptr;
        }
        break;
      case JournalRecord::Type::kDiscarded:
        replay.discarded_step = record.step;
        replay.discarded_attempt = record.attempt;
        if (replay.prepared != nullptr && replay.prepared->step == record.step &&
            replay.prepared->attempt <= record.attempt) {
          replay.prepared = nullptr;
        }
        break;
    }
  }
  if (replay.prepared != nullptr && replay.prepared->step <= base_step) replay.prepared = nullptr;
  return replay;
}

bool FlushOf(const ParticipantImage& image, RecoverReport::Flush* flush) {
  if (image.shards.empty() || image.shards[0].applied_step == kLoading) return false;
  for (const ShardReport& shard : image.shards) {
    if (shard.applied != image.shards[0].applied) return false;
  }
  *flush = {image.shards[0].applied_step, image.shards[0].applied};
  return true;
}

Participant::Participant(std::shared_ptr<const JobSpec> spec, ServerId self, ServerId leader,
                         const ParticipantImage& image, int64_t fresh_incarnation,
                         ParticipantOptions options)
    : spec_(std::move(spec)),
      self_(self),
      leader_(leader),
      options_(options),
      epoch_(image.epoch),
      durable_epoch_(image.epoch),
      start_epoch_(image.epoch),
      incarnation_(image.has_memory ? image.incarnation : fresh_incarnation),
      has_lost_memory_(!image.has_memory && image.incarnation != 0),
      local_index_(spec_->shards.size(), -1),
      flushes_(image.flushes) {
  for (size_t id = 0; id < spec_->shards.size(); ++id) {
    const std::vector<ServerId>& copies = spec_->shards[id].copies;
    if (std::find(copies.begin(), copies.end(), self_) == copies.end()) continue;
    local_index_[id] = static_cast<int>(shards_.size());
    shards_.emplace_back();
    shards_.back().id = static_cast<ShardId>(id);
  }
  if (!image.has_memory) return;
  for (const ShardReport& report : image.shards) {
    const int index = LocalIndex(report.shard);
    if (index < 0) continue;
    shards_[index].applied_step = report.applied_step;
    shards_[index].applied = report.applied;
  }
  if (!shards_.empty()) {
    committed_step_ = shards_[0].applied_step;
    for (const Shard& shard : shards_) {
      committed_step_ = std::min(committed_step_, shard.applied_step);
    }
  } else if (image.last_applied != nullptr) {
    committed_step_ = image.last_applied->step;
  }
  last_applied_ = image.last_applied;
  prepared_ = image.prepared;
  prepared_durable_ = prepared_ != nullptr;
  discarded_step_ = image.discarded_step;
  discarded_attempt_ = image.discarded_attempt;
  generation_ = image.generation;
  attempt_ = image.attempt;
  taken_layout_ = image.layout;
  absent_ = image.absent;
  has_scale_ = image.has_scale;
  scale_ = image.scale;
  for (const StagedPiece& piece : image.pieces) {
    const int index = LocalIndex(piece.key.shard);
    if (index >= 0) shards_[index].pieces.push_back(piece);
  }
  has_pieces_ = !image.pieces.empty();
  if (has_pieces_ || !absent_.empty()) kind_ = image.is_load ? Kind::kLoad : Kind::kGradients;
}

void Participant::SendToLeader(Message message, Actions* actions) const {
  actions->push_back(Send{leader_, std::move(message)});
}

void Participant::OnMessage(ServerId from, const Message& message, int64_t now_ms,
                            Actions* actions) {
  if (life_ != Life::kRunning) return;  // the state that is flushed must not change
  std::visit(
      [&](const auto& content) {
        using T = std::decay_t<decltype(content)>;
        if constexpr (std::is_same_v<T, ForwardReply>) {
          OnForwardReply(from, content, actions);
        } else if constexpr (requires { this->Obey(from, content, now_ms, actions); }) {
          if (content.epoch < epoch_) {
            actions->push_back(Send{from, Fenced{epoch_}});
          } else if (std::is_same_v<T, Recover> || (content.epoch == epoch_ && Joined())) {
            Obey(from, content, now_ms, actions);
          }
        }
      },
      message);
}

// ---- Epochs ----------------------------------------------------------------------------------

void Participant::Obey(ServerId from, const Recover& message, int64_t now_ms, Actions* actions) {
  // The leader has another job of the same name.
  if (message.manifest_digest != spec_->manifest_digest) return;
  if (message.epoch > epoch_) {
    epoch_ = message.epoch;
    leader_ = from;
    opened_ = false;
    stage_report_due_ = false;
    catching_up_ = false;
    restoring_ = false;
    failed_flush_ = {};
    FailPendingPushes(absl::UnavailableError("the job is recovering"), actions);
    actions->push_back(PersistEpoch{epoch_});
    return;
  }
  // In start_epoch_ the leader may have the report of an earlier life of this server, which this
  // one cannot replace: only a new epoch makes the leader ask again.
  if (epoch_ > start_epoch_) MaybeReport(actions);
}

void Participant::OnEpochDurable(int64_t epoch, int64_t now_ms, Actions* actions) {
  durable_epoch_ = std::max(durable_epoch_, epoch);
  if (epoch == epoch_ && epoch_ > start_epoch_) MaybeReport(actions);
  MaybeFlush(actions);
}

void Participant::MaybeReport(Actions* actions) {
  if (durable_epoch_ != epoch_ || life_ != Life::kRunning) return;
  // While a decision or discard is being synced, nobody knows whether a crash would keep it. The
  // report waits until that is known.
  if (!discard_durable_ || (prepared_ != nullptr && !prepared_durable_)) return;
  // Nor while a flush is being written, whose end would make the report untrue.
  if (flushing_) return;
  reported_epoch_ = epoch_;
  reported_flushes_ = flushes_;
  SendToLeader(BuildReport(), actions);
}

RecoverReport Participant::BuildReport() const {
  RecoverReport report;
  report.epoch = epoch_;
  report.incarnation = incarnation_;
  report.shards.reserve(shards_.size());
  for (const Shard& shard : shards_) {
    report.shards.push_back({shard.id, shard.applied_step, shard.applied});
  }
  report.last_applied = last_applied_;
  report.prepared = prepared_;
  report.generation = generation_;
  if (attempt_ > 0 && prepared_ == nullptr) {
    report.staged_step = committed_step_ + 1;
    report.staged_attempt = attempt_;
    report.is_staged = IsStaged();
  }
  report.highest_attempt_step = committed_step_ + 1;
  report.highest_attempt = attempt_;
  if (prepared_ != nullptr && prepared_->step == committed_step_ + 1) {
    report.highest_attempt = std::max(report.highest_attempt, prepared_->attempt);
  }
  if (discarded_step_ == committed_step_ + 1) {
    report.highest_attempt = std::max(report.highest_attempt, discarded_attempt_);
  }
  report.flushes = flushes_;
  return report;
}

// ---- Rollback and catch-up -------------------------------------------------------------------

void Participant::AdoptCommitted(DecisionPtr decision, Actions* actions) {
  DropAttempt(actions);
  attempt_ = 0;
  prepared_ = nullptr;
  prepared_durable_ = false;
  committed_ = false;
  discarded_step_ = kLoading;
  discarded_attempt_ = 0;
  last_applied_ = std::move(decision);
  committed_step_ = last_applied_ == nullptr ? kLoading : last_applied_->step;
  for (Shard& shard : shards_) {
    shard.applying = false;
    shard.pins.clear();
  }
  has_lost_memory_ = false;
  FailWaitingPulls(absl::AbortedError("the job went back, or this copy was replaced"), actions);
}

void Participant::Obey(ServerId from, const Restore& message, int64_t now_ms, Actions* actions) {
  if (restoring_ || flushing_) return;  // OnFlushRestored answers, or a repeat of the message
  const bool live = std::all_of(shards_.begin(), shards_.end(), [&](const Shard& shard) {
    return shard.applied == message.decision && !shard.applying && !damaged_.contains(shard.id);
  });
  if (live && last_applied_ != nullptr && last_applied_->identity == message.decision) {
    if (attempt_ > 0 || prepared_ != nullptr) {
      AdoptCommitted(last_applied_, actions);
      // After a crash the journal must not bring back a decision that was prepared for a later
      // step.
      if (IsJournaled(spec_->level)) {
        actions->push_back(PersistDiscard{committed_step_ + 1, INT64_MAX});
      }
    }
    SendToLeader(RestoreReply{epoch_, message.step, message.decision, absl::OkStatus()}, actions);
    return;
  }
  if (!HasFlush(flushes_, {message.step, message.decision})) {  // what is here stays
    SendToLeader(RestoreReply{epoch_, message.step, message.decision,
                              absl::DataLossError(absl::StrCat(
                                  "server ", self_, " has no flush of that step ", message.step))},
                 actions);
    return;
  }
  restoring_ = true;
  restore_ = message;
  damaged_.clear();
  for (Shard& shard : shards_) {  // while the flush is loaded, the bytes are of no version
    shard.applied_step = kLoading;
    shard.applied = {};
  }
  actions->push_back(LoadFlush{message.step, message.decision});
}

void Participant::OnFlushRestored(const Digest& decision, DecisionPtr restored, absl::Status status,
                                  int64_t now_ms, Actions* actions) {
  if (!restoring_ || decision != restore_.decision) return;
  restoring_ = false;
  if (status.ok()) {
    for (Shard& shard : shards_) {
      shard.applied_step = restored->step;
      shard.applied = restored->identity;
    }
    AdoptCommitted(std::move(restored), actions);
  } else if (absl::IsDataLoss(status)) {  // it must not be offered again
    std::erase_if(flushes_, [&](const auto& flush) { return flush.decision == decision; });
  }
  SendToLeader(RestoreReply{epoch_, restore_.step, restore_.decision, std::move(status)}, actions);
}

bool Participant::CatchUpDone() const {
  const Digest wanted = catch_up_ == nullptr ? Digest{} : catch_up_->identity;
  return std::all_of(shards_.begin(), shards_.end(), [&](const Shard& shard) {
    return catch_up_sources_[shard.id] < 0 || shard.applied == wanted;
  });
}

void Participant::ReplyCatchUp(absl::Status status, Actions* actions) {
  const Digest identity = catch_up_ == nullptr ? Digest{} : catch_up_->identity;
  SendToLeader(CatchUpReply{epoch_, identity, CatchUpDone(), std::move(status)}, actions);
}

void Participant::Obey(ServerId from, const CatchUp& message, int64_t now_ms, Actions* actions) {
  const bool same = catching_up_ && (catch_up_ == nullptr) == (message.decision == nullptr) &&
                    (catch_up_ == nullptr || catch_up_->identity == message.decision->identity);
  if (same) return ReplyCatchUp(catch_up_status_, actions);
  if (flushing_) return;  // the bytes must not change; the leader repeats itself
  catching_up_ = true;
  catch_up_ = message.decision;
  catch_up_status_ = absl::OkStatus();
  catch_up_sources_ = message.sources;
  AdoptCommitted(message.decision, actions);
  for (Shard& shard : shards_) {
    const ServerId source = catch_up_sources_[shard.id];
    if (source < 0) continue;
    const bool is_damaged = damaged_.erase(shard.id) > 0;
    const bool is_here = message.decision != nullptr && shard.applied == message.decision->identity;
    if (is_here && !is_damaged) continue;
    shard.applied_step = kLoading;  // while the shard is copied, its bytes are of no version
    shard.applied = {};
    if (message.decision == nullptr) continue;
    shard.fetching = message.decision->identity;
    actions->push_back(FetchShard{shard.id, source, message.decision});
  }
  ReplyCatchUp(absl::OkStatus(), actions);
}

void Participant::OnShardFetched(ShardId id, const Digest& decision, absl::Status status,
                                 int64_t now_ms, Actions* actions) {
  const int index = LocalIndex(id);
  if (index < 0 || shards_[index].fetching != decision) return;
  Shard& shard = shards_[index];
  shard.fetching = {};
  if (!catching_up_ || catch_up_ == nullptr || catch_up_->identity != decision) return;
  if (!status.ok()) {
    catch_up_status_ = status;
    return ReplyCatchUp(std::move(status), actions);
  }
  shard.applied_step = catch_up_->step;
  shard.applied = decision;
  if (CatchUpDone()) ReplyCatchUp(absl::OkStatus(), actions);
}

// ---- Prepare, apply, discard -----------------------------------------------------------------

absl::Status Participant::CanPrepare(const DecisionRecord& decision) const {
  if (decision.arithmetic_version != spec_->arithmetic_version) {
    return absl::FailedPreconditionError(absl::StrCat(
        "server ", self_, " computes with arithmetic version ", spec_->arithmetic_version,
        ", the decision needs ", decision.arithmetic_version));
  }
  if (decision.step == discarded_step_ && decision.attempt <= discarded_attempt_) {
    return absl::FailedPreconditionError(
        absl::StrCat("attempt ", decision.attempt, " of step ", decision.step, " was discarded"));
  }
  if (prepared_ != nullptr || decision.generation != generation_ || decision.attempt != attempt_) {
    return absl::FailedPreconditionError(
        absl::StrCat("server ", self_, " holds attempt ", attempt_, " of generation ", generation_,
                     ", the decision is of ", decision.attempt, " of ", decision.generation));
  }
  if (!IsStaged()) {
    return absl::FailedPreconditionError(absl::StrCat("server ", self_, " has not staged attempt ",
                                                      decision.attempt, " of step ",
                                                      decision.step));
  }
  for (const Shard& shard : shards_) {
    if (shard.applied != decision.previous) {
      return absl::DataLossError(absl::StrCat(
          "shard ", shard.id, " of tensor ", spec_->tensors[spec_->shards[shard.id].tensor].name,
          " reflects decision ", ToString(shard.applied), ", the next one follows ",
          ToString(decision.previous)));
    }
  }
  return absl::OkStatus();
}

void Participant::ReplyPrepared(absl::Status status, const DecisionRecord& decision,
                                Actions* actions) {
  SendToLeader(Prepared{epoch_, decision.step, decision.identity, spec_->level, std::move(status)},
               actions);
}

void Participant::Obey(ServerId from, const Prepare& message, int64_t now_ms, Actions* actions) {
  const DecisionRecord& decision = *message.decision;
  const bool is_applied = last_applied_ != nullptr && last_applied_->identity == decision.identity;
  const bool is_prepared = prepared_ != nullptr && prepared_->identity == decision.identity;
  if (is_applied || (is_prepared && prepared_durable_)) {
    return ReplyPrepared(absl::OkStatus(), decision, actions);
  }
  // If it is being synced, OnDecisionDurable answers. If its step was committed, nobody waits.
  if (is_prepared || decision.step <= committed_step_) return;
  absl::Status status = CanPrepare(decision);
  if (!status.ok()) return ReplyPrepared(std::move(status), decision, actions);
  prepared_ = message.decision;
  prepared_durable_ = !IsJournaled(spec_->level);
  if (!prepared_durable_) {
    actions->push_back(PersistDecision{prepared_});
    return;
  }
  ReplyPrepared(absl::OkStatus(), decision, actions);
}

void Participant::OnDecisionDurable(const Digest& decision, int64_t now_ms, Actions* actions) {
  if (prepared_ == nullptr || prepared_->identity != decision || prepared_durable_) return;
  prepared_durable_ = true;
  if (Joined()) {
    ReplyPrepared(absl::OkStatus(), *prepared_, actions);
  } else if (epoch_ > start_epoch_) {
    MaybeReport(actions);
  }
  MaybeFlush(actions);
}

void Participant::OnPrepareFailed(const Digest& decision, absl::Status status, int64_t now_ms,
                                  Actions* actions) {
  if (prepared_ == nullptr || prepared_->identity != decision || prepared_durable_) return;
  const DecisionPtr failed = std::exchange(prepared_, nullptr);
  if (Joined()) {
    ReplyPrepared(std::move(status), *failed, actions);
  } else if (epoch_ > start_epoch_) {
    MaybeReport(actions);
  }
  MaybeFlush(actions);
}

void Participant::Obey(ServerId from, const Apply& message, int64_t now_ms, Actions* actions) {
  if (prepared_ == nullptr && last_applied_ != nullptr &&
      last_applied_->identity == message.decision) {
    return ReplyApplied(actions);
  }
  if (prepared_ == nullptr || prepared_->identity != message.decision || !prepared_durable_) return;
  if (!committed_) {
    committed_ = true;
    committed_step_ = prepared_->step;
    for (Shard& shard : shards_) shard.pieces.clear();  // the shell keeps the bytes for StartApply
    // The step is committed, so every in-sync copy has staged all of its pieces.
    FailPendingPushes(absl::OkStatus(), actions);
    DropAttempt(nullptr);
    attempt_ = 1;  // the next step's first attempt is open at once, without an OpenJob
  }
  StartApplies(now_ms, actions);
  ReplyApplied(actions);
}

void Participant::StartApplies(int64_t now_ms, Actions* actions) {
  if (!committed_ || flushing_) return;
  bool all_applied = true;
  for (Shard& shard : shards_) {
    if (shard.applied_step == prepared_->step) continue;
    all_applied = false;
    std::erase_if(shard.pins, [&](const Pin& pin) { return pin.until_ms <= now_ms; });
    if (shard.applying || !shard.pins.empty() || damaged_.contains(shard.id)) continue;
    shard.applying = true;
    actions->push_back(StartApply{shard.id, prepared_});
  }
  if (!all_applied) return;
  last_applied_ = std::exchange(prepared_, nullptr);
  prepared_durable_ = false;
  committed_ = false;
  for (Shard& shard : shards_) CheckStaged(&shard, actions);
  MaybeSendStageReport(actions);
}

void Participant::ReplyApplied(Actions* actions) {
  const DecisionRecord& decision = prepared_ != nullptr ? *prepared_ : *last_applied_;
  SendToLeader(Applied{epoch_, decision.step, decision.identity, prepared_ == nullptr, damage()},
               actions);
}

void Participant::OnShardApplied(ShardId id, int64_t step, int64_t now_ms, Actions* actions) {
  const int index = LocalIndex(id);
  if (index < 0 || prepared_ == nullptr || prepared_->step != step) return;
  Shard& shard = shards_[index];
  if (!shard.applying) return;
  shard.applying = false;
  shard.applied_step = step;
  shard.applied = prepared_->identity;
  WakePulls(&shard, now_ms, actions);
  StartApplies(now_ms, actions);
  if (prepared_ == nullptr && Joined()) ReplyApplied(actions);
  MaybeFlush(actions);
}

void Participant::OnShardDamaged(ShardId id, int64_t step, absl::Status status, int64_t now_ms,
                                 Actions* actions) {
  const int index = LocalIndex(id);
  if (index < 0 || prepared_ == nullptr || prepared_->step != step || restoring_) return;
  Shard& shard = shards_[index];
  if (!shard.applying) return;
  shard.applying = false;
  for (const WaitingPull& pull : std::exchange(shard.pulls, {})) {
    Reply(pull.request, status, actions);
  }
  damaged_[id] = std::move(status);
  if (Joined()) ReplyApplied(actions);
}

void Participant::Obey(ServerId from, const Discard& message, int64_t now_ms, Actions* actions) {
  const bool known = message.step == discarded_step_ && message.attempt <= discarded_attempt_;
  if (message.step == committed_step_ + 1 && attempt_ > 0 && attempt_ <= message.attempt) {
    DropAttempt(actions);
    attempt_ = 0;
  }
  if (prepared_ != nullptr && !committed_ && prepared_->step == message.step &&
      prepared_->attempt <= message.attempt) {
    prepared_ = nullptr;
    prepared_durable_ = false;
    if (attempt_ == 0) actions->push_back(DropStaged{message.step, message.attempt});
  }
  if (!known) {
    discarded_step_ = message.step;
    discarded_attempt_ = message.attempt;
    discard_durable_ = !IsJournaled(spec_->level);
    if (!discard_durable_) actions->push_back(PersistDiscard{message.step, message.attempt});
  }
  if (discard_durable_) {
    SendToLeader(Discarded{epoch_, message.step, message.attempt}, actions);
  }
}

void Participant::OnDiscardDurable(int64_t step, int64_t attempt, int64_t now_ms,
                                   Actions* actions) {
  if (step != discarded_step_ || attempt != discarded_attempt_ || discard_durable_) return;
  discard_durable_ = true;
  if (Joined()) {
    SendToLeader(Discarded{epoch_, step, attempt}, actions);
  } else if (epoch_ > start_epoch_) {
    MaybeReport(actions);
  }
  MaybeFlush(actions);
}

// ---- Life ------------------------------------------------------------------------------------

void Participant::OnTick(int64_t now_ms, Actions* actions) {
  if (life_ == Life::kStopped || life_ == Life::kFlushing) return;
  StartApplies(now_ms, actions);
  if (life_ != Life::kRunning) return MaybeFlush(actions);
  if (epoch_ == start_epoch_ && now_ms - register_sent_ms_ >= options_.resend_ms) {
    register_sent_ms_ = now_ms;
    SendToLeader(Register{incarnation_, epoch_}, actions);
  }
  if (stage_report_due_ && now_ms - stage_report_sent_ms_ >= options_.resend_ms) {
    stage_report_sent_ms_ = now_ms;
    MaybeSendStageReport(actions);
  }
  if (now_ms - failure_sent_ms_ >= options_.resend_ms) SendStagingFailure(now_ms, actions);
  for (PendingPush& push : pending_pushes_) {
    if (now_ms - push.sent_ms < options_.resend_ms) continue;
    push.sent_ms = now_ms;
    for (ServerId to : push.waiting) actions->push_back(ForwardBytes{to, push.forward});
  }
}

void Participant::OnStop(int64_t now_ms, Actions* actions) {
  if (life_ != Life::kRunning) return;
  life_ = Life::kDraining;
  FailPendingPushes(absl::UnavailableError("the server is stopping"), actions);
  FailWaitingPulls(absl::UnavailableError("the server is stopping"), actions);
  MaybeFlush(actions);
}

void Participant::MaybeFlush(Actions* actions) {
  if (life_ != Life::kDraining || committed_ || restoring_ || flushing_) return;
  if (durable_epoch_ != epoch_ || !discard_durable_ || !taking_layout_.empty()) return;
  if (prepared_ != nullptr && !prepared_durable_) return;
  for (Shard& shard : shards_) {
    if (!shard.fetching.empty()) return;
  }
  // A flush without any decision would take the place of one that can be rolled back to.
  const bool is_empty = last_applied_ == nullptr && prepared_ == nullptr;
  life_ = has_lost_memory_ && is_empty ? Life::kStopped : Life::kFlushing;
  if (life_ != Life::kFlushing) return;
  actions->push_back(NextFlush(/*is_stop=*/true));
}

// ---- Flushes ---------------------------------------------------------------------------------

void Participant::Obey(ServerId from, const Flush& message, int64_t now_ms, Actions* actions) {
  if (flushing_) return;  // OnFlushed answers
  // A delayed message of an earlier step would name an older one.
  if (!committed_ && message.step == committed_step_) LearnKept(message.kept, actions);
  const auto reply = [&](absl::Status status) {
    SendToLeader(FlushReply{epoch_, message.step, message.decision, std::move(status)}, actions);
  };
  if (HasFlush(flushes_, {message.step, message.decision})) return reply(absl::OkStatus());
  if (message.decision == failed_flush_) return reply(flush_failure_);
  if (absl::Status damaged = damage(); !damaged.ok()) return reply(std::move(damaged));
  const bool is_here =
      !committed_ && std::all_of(shards_.begin(), shards_.end(), [&](const Shard& shard) {
        return shard.applied == message.decision && shard.fetching.empty();
      });
  if (!is_here || restoring_) return;  // the leader repeats itself
  flushing_ = {message.step, message.decision};
  actions->push_back(NextFlush(/*is_stop=*/false));
}

WriteFlush Participant::NextFlush(bool is_stop) {
  needed_.clear();
  for (const RecoverReport::Flush& flush : flushes_)
    if (IsNeeded(flush)) needed_.push_back(flush.step);
  std::erase_if(flushes_, [&](const auto& flush) {  // the new one takes its place
    return is_stop && last_applied_ != nullptr && flush.step == last_applied_->step;
  });
  DropOldFlushes();
  return {is_stop, FlushedSteps(), needed_};
}

// Whether a flush must stay until the next one is on disk: it is the newest that all servers have,
// or may be. When the leader told which that is, every earlier flush had ended, but a server that
// had not applied the committed step yet may have stopped since, which writes the step before it.
bool Participant::IsNeeded(const RecoverReport::Flush& flush) const {
  if (!kept_ || kept_epoch_ != epoch_) return true;
  if (last_applied_ != nullptr && flush.decision == last_applied_->identity) return true;
  if (flush.step <= kept_->step && !kept_->decision.empty()) return flush.step == kept_->step;
  return flush.step >= kept_told_step_ - 1;
}

void Participant::OnFlushed(absl::Status status, bool has_erased, int64_t now_ms,
                            Actions* actions) {
  if (has_erased)
    std::erase_if(flushes_, [&](const auto& flush) {
      return std::find(needed_.begin(), needed_.end(), flush.step) == needed_.end();
    });
  if (life_ == Life::kFlushing) {
    if (status.ok()) life_ = Life::kStopped;
    return;
  }
  if (!flushing_) return;
  const RecoverReport::Flush written = *std::exchange(flushing_, std::nullopt);
  if (status.ok()) flushes_.insert(flushes_.begin(), written);
  if (Joined()) {
    if (!status.ok()) {
      failed_flush_ = written.decision;
      flush_failure_ = status;
    }
    SendToLeader(FlushReply{epoch_, written.step, written.decision, std::move(status)}, actions);
  } else if (epoch_ > start_epoch_) {
    MaybeReport(actions);
  }
  StartApplies(now_ms, actions);
  MaybeFlush(actions);
}

// Takes note of the newest flush that all servers have, and forgets those that are not needed.
void Participant::LearnKept(const RecoverReport::Flush& kept, Actions* actions) {
  kept_ = kept;
  kept_epoch_ = epoch_;
  kept_told_step_ = committed_step_;
  const auto is_needless = [&](const RecoverReport::Flush& flush) {
    // The job went back to the committed step: what was written of later ones is another history.
    const bool is_made = last_applied_ != nullptr && flush.decision == last_applied_->identity;
    if (flush.step > committed_step_ || (flush.step == committed_step_ && !is_made)) return true;
    // The leader has seen this flush in the report, and some server does not have it. No server can
    // write it any more, not even one that stops before it has applied the committed step.
    return HasFlush(reported_flushes_, flush) && flush.step < committed_step_ - 1 &&
           (kept.decision.empty() || flush.step > kept.step);
  };
  if (std::erase_if(flushes_, is_needless) > 0) actions->push_back(KeepFlushes{FlushedSteps()});
}

// Forgets the flushes that are not needed once the next one is written. One that is newer than what
// all servers have may be what all have by now, if only the leader knows it. Before the leader has
// told, every one may be.
void Participant::DropOldFlushes() {
  if (!kept_ || kept_->decision.empty()) return;
  size_t count = 1;  // the next one
  std::erase_if(flushes_, [&](const auto& flush) {
    return ++count > kKeptFlushes && flush.step < kept_->step;
  });
}

std::vector<int64_t> Participant::FlushedSteps() const {
  std::vector<int64_t> steps;
  steps.reserve(flushes_.size());
  for (const RecoverReport::Flush& flush : flushes_) steps.push_back(flush.step);
  return steps;
}

ParticipantImage Participant::Image() const {
  ParticipantImage image;
  image.epoch = durable_epoch_;
  image.incarnation = incarnation_;
  image.has_memory = true;
  for (const Shard& shard : shards_) {
    image.shards.push_back({shard.id, shard.applied_step, shard.applied});
    image.pieces.insert(image.pieces.end(), shard.pieces.begin(), shard.pieces.end());
  }
  image.last_applied = last_applied_;
  image.prepared = prepared_;
  image.discarded_step = discarded_step_;
  image.discarded_attempt = discarded_attempt_;
  image.layout = taken_layout_;
  image.generation = generation_;
  image.attempt = attempt_;
  image.is_load = kind_ == Kind::kLoad;
  image.has_scale = has_scale_;
  image.scale = scale_;
  image.absent = absent_;
  image.flushes = flushes_;
  return image;
}

Position Participant::position() const {
  return {epoch_, generation_, committed_step_, opened_ ? attempt_ : 0};
}

absl::Status Participant::AppliedOf(ShardId id, int64_t* step, Digest* decision) const {
  const int index = LocalIndex(id);
  if (index < 0) {
    return absl::NotFoundError(absl::StrCat("server ", self_, " has no copy of shard ", id));
  }
  *step = shards_[index].applied_step;
  *decision = shards_[index].applied;
  return absl::OkStatus();
}

}  // namespace orlop::step
