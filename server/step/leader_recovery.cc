// Epochs and recovery of a leader: from a raised epoch to an open job.
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
#include "server/step/actions.h"
#include "server/step/identity.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/leader.h"
#include "server/step/messages.h"
#include "server/step/reason.h"
#include "server/step/recovery.h"

namespace orlop::step {

void Leader::Persist(Actions* actions) {
  ++record_.version;
  persisting_ = true;
  actions->push_back(PersistRecord{record_});
}

absl::Status Leader::Recovering() const {
  return absl::UnavailableError(
      absl::StrCat("the job is recovering", recovery_cause_.empty() ? "" : ": ", recovery_cause_));
}

void Leader::BeginEpoch(int64_t now_ms, Actions* actions) {
  phase_ = Phase::kNewEpoch;
  phase_ms_ = now_ms;
  decision_ = nullptr;
  installing_ = false;
  FailCommits(Recovering(), actions);
  ReplyAll(&aborts_, Recovering(), actions);
  ReplyAll(&issuing_, Recovering(), actions);
  ReplyAll(&accepting_, Recovering(), actions);
  EndFlush(Recovering(), actions);
  failed_flush_ = {};
  if (persisting_) {
    new_epoch_wanted_ = true;
    return;
  }
  record_.epoch = std::max(record_.epoch, epoch_seen_) + 1;
  Persist(actions);
}

void Leader::OnRecordPersisted(int64_t version, bool ok, int64_t now_ms, Actions* actions) {
  if (deposed_ || !persisting_ || version != record_.version) return;
  persisting_ = false;
  if (!ok) {
    deposed_ = true;
    const absl::Status status = absl::UnavailableError("another server leads the job now");
    FailCommits(status, actions);
    EndFlush(status, actions);
    std::vector<RequestId> gathered = gathering_.Finish();
    for (auto* list : {&aborts_, &rollbacks_, &opening_, &issuing_, &accepting_, &gathered}) {
      ReplyAll(list, status, actions);
    }
    for (const PendingJoin& pending : std::exchange(joins_, {})) {
      Reply(pending.request, status, actions);
    }
    return;
  }
  if (std::exchange(new_epoch_wanted_, false)) return BeginEpoch(now_ms, actions);
  switch (phase_) {
    case Phase::kNewEpoch:
      return EnterCollect(now_ms, actions);
    case Phase::kNarrow:
      return EnterPrepare(now_ms, actions);
    case Phase::kWiden:
      return EnterOpen(now_ms, actions);
    default:
      break;
  }
  for (RequestId request : std::exchange(issuing_, {})) {
    Answer answer{request, absl::OkStatus(), Status().position,
                  nullptr, spec_->level,     record_.generation};
    actions->push_back(std::move(answer));
  }
  ReplyAll(&accepting_, absl::OkStatus(), actions);
  if (std::exchange(installing_, false)) {
    const std::vector<RequestId> gathered = gathering_.Finish();
    opening_.insert(opening_.end(), gathered.begin(), gathered.end());
    int64_t before = 0;  // the generation of the CommitSteps that wait
    for (const Commit& commit : commits_) {
      if (commit.present) before = commit.request.generation;
    }
    OpenNextAttempt(StaleGeneration(before, record_.formed), actions);
  }
  Advance(now_ms, actions);
}

void Leader::EnterCollect(int64_t now_ms, Actions* actions) {
  phase_ = Phase::kCollect;
  phase_ms_ = now_ms;
  reports_.assign(spec_->server_count, std::nullopt);
  verdict_ = {};
  for (Server& server : servers_) server = {.heard_ms = server.heard_ms};
  SendWanted(now_ms, actions);
}

// ---- Collecting reports ----------------------------------------------------------------------

bool Leader::IsInSync(ShardId shard, ServerId server) const {
  const std::vector<Copy>& copies = record_.in_sync[shard];
  return std::any_of(copies.begin(), copies.end(),
                     [&](const Copy& copy) { return copy.server == server; });
}

bool Leader::HoldsInSync(ServerId server) const {
  for (size_t shard = 0; shard < record_.in_sync.size(); ++shard) {
    if (IsInSync(static_cast<ShardId>(shard), server)) return true;
  }
  return false;
}

// Returns whether recovery need not wait for the copy any longer: its server has reported, in any
// incarnation, or copy_timeout_ms have passed.
bool Leader::IsSettled(const Copy& copy, int64_t now_ms) const {
  return reports_[copy.server].has_value() || now_ms - phase_ms_ >= options_.copy_timeout_ms;
}

bool Leader::HaveAllReported() const {
  return std::all_of(reports_.begin(), reports_.end(),
                     [](const auto& report) { return report.has_value(); });
}

// Makes every copy in sync, in the incarnation of its server's report. Every server must have
// reported.
void Leader::AdoptPresentCopies() {
  record_.in_sync.assign(spec_->shards.size(), {});
  for (size_t shard = 0; shard < spec_->shards.size(); ++shard) {
    for (ServerId server : spec_->shards[shard].copies) {
      record_.in_sync[shard].push_back({server, reports_[server]->incarnation});
    }
  }
}

void Leader::Collect(int64_t now_ms, Actions* actions) {
  if (persisting_) return;
  if (record_.rolling_back) return StartRollBack(now_ms, actions);
  if (!record_.opened) {
    if (!HaveAllReported()) return;
    AdoptPresentCopies();
    record_.opened = true;
  } else {
    for (const std::vector<Copy>& copies : record_.in_sync) {
      for (const Copy& copy : copies) {
        if (!IsSettled(copy, now_ms)) return;
      }
    }
  }
  verdict_ = Resolve(*spec_, record_.in_sync, reports_);
  if (verdict_.outcome == Verdict::Outcome::kNoVoter && IsStillLoading(record_, reports_)) {
    AdoptPresentCopies();  // there was nothing to lose: the job can still be loaded
    verdict_ = Resolve(*spec_, record_.in_sync, reports_);
  }
  if (verdict_.outcome != Verdict::Outcome::kFound) return;
  record_.in_sync = verdict_.in_sync;
  CheckGeneration();
  phase_ = Phase::kNarrow;
  phase_ms_ = now_ms;
  Persist(actions);
}

// If a server has seen a later generation than the record has, the record is a lost one, or an
// older one that was put back. Its contributors are not known, so they have to join anew.
void Leader::CheckGeneration() {
  for (const auto& report : reports_) {
    if (!report.has_value() || report->generation <= record_.formed) continue;
    record_.formed = report->generation;
    record_.generation = std::max(record_.generation, record_.formed);
    record_.layout = nullptr;
  }
}

// ---- Rollback --------------------------------------------------------------------------------

// Returns whether, for every shard, some server that has reported can restore the accepted state.
bool Leader::HoldsRollback() const {
  const RecoverReport::Flush target{record_.rollback_step, record_.rollback_digest};
  return std::all_of(spec_->shards.begin(), spec_->shards.end(), [&](const ShardSpec& shard) {
    return std::any_of(shard.copies.begin(), shard.copies.end(), [&](ServerId server) {
      return reports_[server].has_value() && CanRestore(*reports_[server], target);
    });
  });
}

void Leader::StartRollBack(int64_t now_ms, Actions* actions) {
  if (!HoldsRollback()) return;  // waits for more reports, or for another accepted rollback
  phase_ = Phase::kRollBack;
  phase_ms_ = now_ms;
  SendWanted(now_ms, actions);
}

// Ends the rollback once every server that can be restored has been restored or has failed, or
// copy_timeout_ms have passed.
void Leader::CheckRollBack(int64_t now_ms, Actions* actions) {
  const RecoverReport::Flush target{record_.rollback_step, record_.rollback_digest};
  for (ServerId server = 0; server < spec_->server_count; ++server) {
    const bool able = reports_[server].has_value() && CanRestore(*reports_[server], target);
    const bool done = servers_[server].restored || servers_[server].restore_failed;
    if (able && !done && now_ms - phase_ms_ < options_.copy_timeout_ms) return;
  }
  Placement restored(spec_->shards.size());
  for (size_t shard = 0; shard < spec_->shards.size(); ++shard) {
    for (ServerId server : spec_->shards[shard].copies) {
      if (!servers_[server].restored) continue;
      restored[shard].push_back({server, reports_[server]->incarnation});
    }
    if (!restored[shard].empty()) continue;
    const bool failed =
        std::all_of(spec_->shards[shard].copies.begin(), spec_->shards[shard].copies.end(),
                    [&](ServerId server) { return servers_[server].restore_failed; });
    if (failed) {
      record_.rolling_back = false;
      ReplyAll(&rollbacks_,
               absl::DataLossError(absl::StrCat("shard ", shard, ": no flush of step ", target.step,
                                                " could be read")),
               actions);
      BeginEpoch(now_ms, actions);
    }
    return;
  }
  record_.in_sync = std::move(restored);
  record_.rolling_back = false;
  record_.accepted_at = target.step;
  record_.accepted_loss = INT64_MAX;
  BeginEpoch(now_ms, actions);  // its recovery finds a job that holds exactly the target
}

// ---- Carrying the verdict out ----------------------------------------------------------------

// Chooses the attempt of step() to open (attempt_), and the highest to discard before that
// (discard_attempt_; 0: none).
void Leader::ChooseAttempt() {
  int64_t highest = 0;
  bool was_sent = false;  // a record of step() is prepared somewhere
  bool is_whole = true;   // every in-sync copy still has the staged bytes of `highest`
  for (const auto& report : reports_) {
    if (!report.has_value()) continue;
    if (report->highest_attempt_step == step())
      highest = std::max(highest, report->highest_attempt);
    if (report->prepared != nullptr && report->prepared->step == step()) {
      was_sent = true;
      highest = std::max(highest, report->prepared->attempt);
    }
  }
  for (ServerId server = 0; server < spec_->server_count; ++server) {
    if (!HoldsInSync(server)) continue;
    const RecoverReport& report = *reports_[server];
    is_whole = is_whole && report.staged_step == step() && report.staged_attempt == highest &&
               report.generation == record_.formed;
  }
  discard_attempt_ = was_sent ? highest : 0;
  attempt_ = is_whole && !was_sent && highest > 0 ? highest : highest + 1;
}

void Leader::EnterPrepare(int64_t now_ms, Actions* actions) {
  phase_ = Phase::kPrepare;
  phase_ms_ = now_ms;
  committed_ = verdict_.decision;
  ChooseAttempt();
  for (ServerId server = 0; server < spec_->server_count; ++server) {
    Server& state = servers_[server];
    state.sent_ms = INT64_MIN / 2;
    state.discarded = discard_attempt_ == 0;
    state.applied = true;
    if (!reports_[server].has_value() || committed_ == nullptr) {
      state.prepared = true;
      continue;
    }
    for (const ShardReport& shard : reports_[server]->shards) {
      state.applied = state.applied && shard.applied == committed_->identity;
    }
    state.prepared = state.applied;
  }
  Advance(now_ms, actions);
}

void Leader::EnterFinish(int64_t now_ms, Actions* actions) {
  phase_ = Phase::kFinish;
  phase_ms_ = now_ms;
  // A recovery applies the committed step in spite of holds, so a hold of an earlier step ends.
  std::erase_if(holds_, [&](const auto& entry) { return entry.second.step < committed_step(); });
  for (Server& server : servers_) server.sent_ms = INT64_MIN / 2;
  Advance(now_ms, actions);
}

bool Leader::NeedsCatchUp(ServerId server) const {
  return !servers_[server].catch_up_failed && IsBehind(server);
}

bool Leader::IsBehind(ServerId server) const {
  if (!reports_[server].has_value()) return false;
  for (size_t shard = 0; shard < spec_->shards.size(); ++shard) {
    const std::vector<ServerId>& copies = spec_->shards[shard].copies;
    if (std::find(copies.begin(), copies.end(), server) != copies.end() &&
        !IsInSync(static_cast<ShardId>(shard), server)) {
      return true;
    }
  }
  return false;
}

void Leader::EnterCatchUp(int64_t now_ms, Actions* actions) {
  phase_ = Phase::kCatchUp;
  phase_ms_ = now_ms;
  for (Server& server : servers_) {
    server.sent_ms = INT64_MIN / 2;
    server.heard_ms = now_ms;
  }
  Advance(now_ms, actions);
}

void Leader::EnterOpen(int64_t now_ms, Actions* actions) {
  phase_ = Phase::kOpen;
  phase_ms_ = now_ms;
  placement_ = std::make_shared<const Placement>(record_.in_sync);
  kept_flush_ = NewestCommonFlush(*spec_, reports_, committed_step());
  for (Server& server : servers_) {
    server.opened = false;
    server.applied = true;
    server.heard_ms = now_ms;
  }
  ForgetAttempt();
  Advance(now_ms, actions);
}

void Leader::EnterServing(int64_t now_ms, Actions* actions) {
  phase_ = Phase::kServing;
  phase_ms_ = now_ms;
  recovery_cause_.clear();
  ReplyAll(&rollbacks_, absl::OkStatus(), actions);
  for (RequestId request : std::exchange(flush_requests_, {})) OnFlush(request, now_ms, actions);
}

// Moves through the phases, and in kServing through the step, as far as the state allows. Then
// sends the messages that are due.
void Leader::Advance(int64_t now_ms, Actions* actions) {
  if (deposed_) return;
  if (phase_ == Phase::kCollect) Collect(now_ms, actions);
  if (phase_ == Phase::kRollBack) CheckRollBack(now_ms, actions);
  if (phase_ == Phase::kPrepare && AllServers(&Server::prepared) &&
      AllServers(&Server::discarded)) {
    EnterFinish(now_ms, actions);
  }
  if (phase_ == Phase::kFinish && AllServers(&Server::applied)) EnterCatchUp(now_ms, actions);
  if (phase_ == Phase::kCatchUp) {
    bool widened = false;
    for (ServerId server = 0; server < spec_->server_count; ++server) {
      if (!NeedsCatchUp(server)) continue;
      Server& state = servers_[server];
      if (!state.caught_up) {
        if (now_ms - state.heard_ms < options_.copy_timeout_ms) {
          return SendWanted(now_ms, actions);
        }
        state.catch_up_failed = true;
        continue;
      }
      widened = true;
    }
    if (!widened) {
      EnterOpen(now_ms, actions);
    } else {
      for (size_t shard = 0; shard < spec_->shards.size(); ++shard) {
        Placement::value_type copies;
        for (ServerId server : spec_->shards[shard].copies) {
          const bool kept = IsInSync(static_cast<ShardId>(shard), server);
          if (!kept && (!NeedsCatchUp(server) || !servers_[server].caught_up)) continue;
          copies.push_back({server, reports_[server]->incarnation});
        }
        record_.in_sync[shard] = std::move(copies);
      }
      ++attempt_;  // the new copies have none of its staged bytes
      phase_ = Phase::kWiden;
      phase_ms_ = now_ms;
      Persist(actions);
    }
  }
  if (phase_ == Phase::kOpen && AllServers(&Server::opened)) EnterServing(now_ms, actions);
  if (phase_ == Phase::kServing && !persisting_) {
    for (const PendingJoin& pending : std::exchange(joins_, {})) {
      HandleJoin(pending, now_ms, actions);
    }
    if (AllServers(&Server::opened)) {
      ReplyAll(&opening_, absl::OkStatus(), actions);
      ReplyAll(&aborts_, absl::OkStatus(), actions);
    } else if (absl::Status damage = Damage(); !damage.ok()) {
      ReplyAll(&opening_, damage, actions);  // a server with a damaged shard never opens
      ReplyAll(&aborts_, damage, actions);
    }
    MaybeInstallGeneration(now_ms, actions);
    MaybeDecide(now_ms, actions);
    MaybeCommit(now_ms, actions);
  }
  SendWanted(now_ms, actions);
}

// ---- Messages --------------------------------------------------------------------------------

// Sets `*message` to the next message that the server must answer. Returns false if there is none.
bool Leader::WantedMessage(ServerId server, int64_t now_ms, Message* message) const {
  const Server& state = servers_[server];
  const int64_t epoch = record_.epoch;
  // An epoch or a new generation is not sent to any server before it is persisted.
  if (phase_ == Phase::kNewEpoch || installing_) return false;
  if (!reports_[server].has_value()) {
    *message = Recover{epoch, spec_->manifest_digest};
    return true;
  }
  if (phase_ == Phase::kRollBack) {
    const RecoverReport::Flush target{record_.rollback_step, record_.rollback_digest};
    if (!CanRestore(*reports_[server], target) || state.restored || state.restore_failed)
      return false;
    *message = Restore{epoch, target.step, target.decision};
    return true;
  }
  if (phase_ == Phase::kCatchUp) {
    if (!NeedsCatchUp(server) || state.caught_up) return false;
    *message = CatchUpMessage(server);
    return true;
  }
  if (!HoldsInSync(server)) return false;
  if (phase_ == Phase::kPrepare) {
    if (!state.discarded) {
      *message = Discard{epoch, step(), discard_attempt_};
    } else if (!state.prepared) {
      *message = Prepare{epoch, committed_};
    } else {
      return false;
    }
    return true;
  }
  if (phase_ != Phase::kFinish && phase_ != Phase::kOpen && phase_ != Phase::kServing) return false;
  const bool is_flush_due = flush_ && !state.flushed;
  if (!state.applied && phase_ == Phase::kServing && !MayApply(now_ms)) {
    if (is_flush_due) *message = Flush{epoch, flush_->step, flush_->decision, kept_flush_};
    return is_flush_due;
  }
  if (!state.applied) {
    *message = Apply{epoch, committed_->step, committed_->identity};
    return true;
  }
  if (phase_ == Phase::kFinish) return false;
  if (!state.opened) {
    *message = OpenMessage();
    return true;
  }
  if (decision_ != nullptr && !state.prepared) {
    *message = Prepare{epoch, decision_};
    return true;
  }
  for (const Commit& commit : commits_) {
    if (!commit.present || commit.request.absent.empty()) continue;
    if (state.absent_known[commit.request.rank]) continue;
    *message =
        Absent{epoch, record_.formed, step(), attempt_, commit.request.rank, commit.request.absent};
    return true;
  }
  if (!state.sealed && AllCommitted() && commits_[0].request.is_load) {
    *message = Seal{epoch, record_.formed, step(), attempt_};
    return true;
  }
  if (is_flush_due) *message = Flush{epoch, flush_->step, flush_->decision, kept_flush_};
  return is_flush_due;
}

CatchUp Leader::CatchUpMessage(ServerId server) const {
  CatchUp message{record_.epoch, committed_, std::vector<ServerId>(spec_->shards.size(), -1)};
  for (size_t shard = 0; shard < spec_->shards.size(); ++shard) {
    const std::vector<ServerId>& copies = spec_->shards[shard].copies;
    const bool here = std::find(copies.begin(), copies.end(), server) != copies.end();
    if (here) message.sources[shard] = record_.in_sync[shard].front().server;
  }
  return message;
}

OpenJob Leader::OpenMessage() const {
  return {record_.epoch,          record_.formed, committed_step(), attempt_,
          spec_->manifest_digest, record_.layout, placement_,       kept_flush_};
}

void Leader::SendWanted(int64_t now_ms, Actions* actions) {
  for (ServerId server = 0; server < spec_->server_count; ++server) {
    Server& state = servers_[server];
    if (now_ms - state.sent_ms < options_.resend_ms) continue;
    Message message;
    if (!WantedMessage(server, now_ms, &message)) continue;
    state.sent_ms = now_ms;
    actions->push_back(Send{server, std::move(message)});
  }
}

void Leader::OnMessage(ServerId from, const Message& message, int64_t now_ms, Actions* actions) {
  if (deposed_ || from < 0 || from >= spec_->server_count) return;
  servers_[from].heard_ms = now_ms;
  std::visit(
      [&](const auto& content) {
        using T = std::decay_t<decltype(content)>;
        if constexpr (requires { this->On(from, content, now_ms, actions); }) {
          epoch_seen_ = std::max(epoch_seen_, content.epoch);
          const bool current = phase_ != Phase::kNewEpoch && content.epoch == record_.epoch;
          if (current || std::is_same_v<T, Register> || std::is_same_v<T, Fenced>) {
            On(from, content, now_ms, actions);
          }
        }
      },
      message);
}

void Leader::On(ServerId from, const Register& message, int64_t now_ms, Actions* actions) {
  if (!started_ || phase_ == Phase::kNewEpoch) return;  // it will register again
  const bool reported = reports_[from].has_value();
  const bool restarted = reported && reports_[from]->incarnation != message.incarnation;
  if (message.epoch >= record_.epoch || restarted) return BeginEpoch(now_ms, actions);
  if (reported) return;  // the server sent it before its report
  Resend(from);
  SendWanted(now_ms, actions);
}

void Leader::On(ServerId from, const Fenced& message, int64_t now_ms, Actions* actions) {
  if (message.epoch > record_.epoch && phase_ != Phase::kNewEpoch) BeginEpoch(now_ms, actions);
}

void Leader::On(ServerId from, const RecoverReport& message, int64_t now_ms, Actions* actions) {
  if (reports_[from].has_value()) {
    if (reports_[from]->incarnation != message.incarnation) BeginEpoch(now_ms, actions);
    return;
  }
  reports_[from] = message;
  Advance(now_ms, actions);
}

void Leader::On(ServerId from, const RestoreReply& message, int64_t now_ms, Actions* actions) {
  if (phase_ != Phase::kRollBack || message.decision != record_.rollback_digest) return;
  (message.status.ok() ? servers_[from].restored : servers_[from].restore_failed) = true;
  Advance(now_ms, actions);
}

void Leader::On(ServerId from, const CatchUpReply& message, int64_t now_ms, Actions* actions) {
  const Digest wanted = committed_ == nullptr ? Digest{} : committed_->identity;
  if (phase_ != Phase::kCatchUp || message.decision != wanted) return;
  if (!message.status.ok()) servers_[from].catch_up_failed = true;
  if (message.done) servers_[from].caught_up = true;
  Advance(now_ms, actions);
}

void Leader::On(ServerId from, const OpenReply& message, int64_t now_ms, Actions* actions) {
  if (phase_ != Phase::kOpen && phase_ != Phase::kServing) return;
  if (message.generation != record_.formed || message.committed_step != committed_step() ||
      message.attempt != attempt_) {
    return;
  }
  if (!message.status.ok() && phase_ == Phase::kServing) {
    // The waiting Joins and AbortSteps get the error. The job continues when a later OpenJob finds
    // room, or with a generation that needs less. In a recovery (kOpen) the server counts as opened
    // without room: it serves versions and refuses pushes.
    ReplyAll(&opening_, message.status, actions);
    return ReplyAll(&aborts_, message.status, actions);
  }
  servers_[from].opened = true;
  Resend(from);
  Advance(now_ms, actions);
}

void Leader::On(ServerId from, const Discarded& message, int64_t now_ms, Actions* actions) {
  if (phase_ != Phase::kPrepare || message.step != step() || message.attempt < discard_attempt_) {
    return;
  }
  servers_[from].discarded = true;
  Resend(from);
  Advance(now_ms, actions);
}

// ---- Copies that fall silent -----------------------------------------------------------------

// Returns whether every shard has an in-sync copy on another server.
bool Leader::CanSpare(ServerId server) const {
  for (size_t shard = 0; shard < record_.in_sync.size(); ++shard) {
    if (IsInSync(static_cast<ShardId>(shard), server) && record_.in_sync[shard].size() == 1) {
      return false;
    }
  }
  return true;
}

void Leader::FindSilentCopies(int64_t now_ms, Actions* actions) {
  if (phase_ == Phase::kNewEpoch || phase_ == Phase::kCollect || phase_ == Phase::kRollBack) return;
  for (ServerId server = 0; server < spec_->server_count; ++server) {
    if (!HoldsInSync(server) || !CanSpare(server)) continue;
    const int64_t silent_ms = now_ms - std::max(servers_[server].heard_ms, phase_ms_);
    if (silent_ms >= options_.copy_timeout_ms) return BeginEpoch(now_ms, actions);
    if (phase_ == Phase::kServing && !installing_ && silent_ms >= options_.copy_timeout_ms / 2) {
      // The leader repeats a message that the server answers at once, as a keep-alive. While a hold
      // delays the apply, the server cannot open the next step, but has the committed one prepared.
      if (now_ms - servers_[server].sent_ms < options_.resend_ms) continue;
      servers_[server].sent_ms = now_ms;
      Message message = Prepare{record_.epoch, committed_};
      if (servers_[server].applied) message = OpenMessage();
      actions->push_back(Send{server, std::move(message)});
    }
  }
}

void Leader::OnTick(int64_t now_ms, Actions* actions) {
  if (deposed_) return;
  if (!started_) {
    started_ = true;
    return BeginEpoch(now_ms, actions);
  }
  FindSilentCopies(now_ms, actions);
  // A copy that reported too late for this epoch's catch-up gets a new epoch at once. A copy whose
  // catch-up failed gets one after 4 * copy_timeout_ms.
  if (phase_ == Phase::kServing && decision_ == nullptr && !persisting_) {
    const bool retry_failed = now_ms - phase_ms_ >= 4 * options_.copy_timeout_ms;
    for (ServerId server = 0; server < spec_->server_count; ++server) {
      if (NeedsCatchUp(server) || (retry_failed && IsBehind(server))) {
        return BeginEpoch(now_ms, actions);
      }
    }
  }
  Advance(now_ms, actions);
}

}  // namespace orlop::step
