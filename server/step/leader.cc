// One push, 6 of 8 (ARCHITECTURE.md); next: server/shards/shard_apply.cc
// Steps of a serving leader: generations, commits, decisions. Recovery is in leader_recovery.cc.
#include "server/step/leader.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "server/step/actions.h"
#include "server/step/decision.h"
#include "server/step/gathering.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/messages.h"
#include "server/step/reason.h"
#include "server/step/recovery.h"

namespace orlop::step {

Leader::Leader(std::shared_ptr<const JobSpec> spec, ServerId self, JobRecord record,
               ScalarBuilder build_scalars, LeaderOptions options)
    : spec_(std::move(spec)),
      self_(self),
      record_(std::move(record)),
      build_scalars_(std::move(build_scalars)),
      options_(options),
      reports_(spec_->server_count),
      servers_(spec_->server_count) {
  record_.in_sync.resize(spec_->shards.size());
}

// ---- Answers ---------------------------------------------------------------------------------

JobStatusReport Leader::Status() const {
  JobStatusReport report;
  report.position = {record_.epoch, record_.formed, committed_step(),
                     phase_ == Phase::kServing && record_.layout != nullptr ? attempt_ : 0};
  report.applied_step = committed_step();
  if (committed_ != nullptr && !AllServers(&Server::applied)) --report.applied_step;
  report.generation_issued = record_.generation;
  report.serving = serving();
  report.last_decision = committed_;
  report.in_sync = record_.in_sync;
  report.joined_ranks = gathering_.claimed_ranks();
  for (const Commit& commit : commits_) {
    if (commit.present) report.committed_ranks.push_back(commit.request.rank);
  }
  report.waiting_for = std::string(Damage().message());
  if (deposed_) {
    report.waiting_for = "another server leads the job now";
  } else if (phase_ == Phase::kCollect) {
    report.waiting_for = verdict_.reason.empty() ? "reports of servers:" : verdict_.reason;
    for (ServerId server = 0; server < spec_->server_count; ++server) {
      if (!reports_[server].has_value()) absl::StrAppend(&report.waiting_for, " ", server);
    }
    report.is_stuck = HaveAllReported();
    report.has_lost_memory = has_lost_memory();
    report.rollback_offers = RollbackOffers(*spec_, reports_);
  } else if (phase_ != Phase::kServing) {
    report.waiting_for = phase_ == Phase::kCatchUp ? "copies to catch up" : "recovery to finish";
    if (!recovery_cause_.empty()) absl::StrAppend(&report.waiting_for, ": ", recovery_cause_);
  }
  return report;
}

void Leader::Reply(RequestId request, absl::Status status, Actions* actions) const {
  Answer answer;
  answer.request = request;
  answer.status = std::move(status);
  answer.position = {record_.epoch, record_.formed, committed_step(), attempt_};
  answer.level = spec_->level;
  actions->push_back(std::move(answer));
}

void Leader::ReplyCommitted(RequestId request, Actions* actions) const {
  Reply(request, absl::OkStatus(), actions);
  std::get<Answer>(actions->back()).decision = committed_;
}

void Leader::ReplyAll(std::vector<RequestId>* requests, const absl::Status& status,
                      Actions* actions) {
  for (RequestId request : std::exchange(*requests, {})) Reply(request, status, actions);
}

bool Leader::AllServers(bool Server::*flag) const {
  for (ServerId server = 0; server < spec_->server_count; ++server) {
    if (HoldsInSync(server) && !(servers_[server].*flag)) return false;
  }
  return true;
}

// ---- Attempts --------------------------------------------------------------------------------

void Leader::ForgetAttempt() {
  const int world_size = record_.layout == nullptr ? 0 : record_.layout->world_size();
  commits_.assign(world_size, {});
  for (Server& server : servers_) {
    server.staged.reset();
    server.sealed = false;
    server.prepared = false;
    server.absent_known.assign(world_size, 0);
    server.sent_ms = INT64_MIN / 2;
  }
}

void Leader::FailCommits(const absl::Status& status, Actions* actions) {
  for (Commit& commit : commits_) {
    ReplyAll(&commit.waiting, status, actions);
    commit = {};
  }
}

// Ends the open attempt, whose waiting commits get `status` and the number of the next one.
void Leader::OpenNextAttempt(const absl::Status& status, Actions* actions) {
  ++attempt_;
  FailCommits(status, actions);
  ForgetAttempt();
  for (Server& server : servers_) server.opened = false;
}

// The open attempt cannot be decided. Every CommitStep of it learns why.
void Leader::FailAttempt(const absl::Status& why, Actions* actions) {
  last_failure_ = {step(), attempt_, std::string(why.message())};
  OpenNextAttempt(why, actions);
}

void Leader::OnAbortStep(RequestId request, const AbortRequest& abort, int64_t now_ms,
                         Actions* actions) {
  if (deposed_ || phase_ != Phase::kServing) {
    return Reply(request, Recovering(), actions);
  }
  const bool is_over = abort.step <= step() && (abort.generation < record_.formed ||
                                                (abort.step == step() && abort.attempt < attempt_));
  const bool is_open =
      abort.step == step() && abort.generation == record_.formed && abort.attempt == attempt_;
  const auto refuse = [&](Reason reason, const std::string& text) {
    const bool has_formed = abort.generation <= record_.formed;
    Reply(request,
          Because(has_formed ? reason : Reason::kStaleGeneration,
                  absl::FailedPreconditionError(text)),
          actions);
  };
  if (abort.step == committed_step() || (is_open && decision_ != nullptr)) {
    return refuse(Reason::kDecided, absl::StrCat("step ", abort.step, " is decided"));
  }
  if (is_over || (abort.epoch != 0 && abort.epoch < record_.epoch)) {
    return Reply(request, absl::OkStatus(), actions);
  }
  if (!is_open) {
    return refuse(Reason::kWrongStep,
                  absl::StrCat("attempt ", abort.attempt, " of step ", abort.step, " is not open"));
  }
  aborts_.push_back(request);
  OpenNextAttempt(absl::AbortedError(absl::StrCat("attempt ", attempt_, " of step ", step(),
                                                  " was aborted, ", attempt_ + 1, " is open")),
                  actions);
  Advance(now_ms, actions);
}

// ---- Generations -----------------------------------------------------------------------------

void Leader::OnJoin(RequestId request, const JoinRequest& join, int64_t now_ms, Actions* actions) {
  if (deposed_) {
    return Reply(request, absl::UnavailableError("another server leads the job now"), actions);
  }
  if (absl::Status status = ClaimRank(join); !status.ok()) {
    return Reply(request, std::move(status), actions);
  }
  joins_.push_back({request, join});
  Advance(now_ms, actions);
}

absl::Status Leader::ClaimRank(const JoinRequest& join) {
  return gathering_.Claim(join, record_.generation);
}

absl::Status Leader::CheckMinCommitted(int64_t min_committed_step) {
  if (min_committed_step <= committed_step()) return absl::OkStatus();
  if (record_.accepted_at == committed_step() && min_committed_step <= record_.accepted_loss) {
    return absl::OkStatus();
  }
  claimed_loss_ = std::max(claimed_loss_, min_committed_step);
  return absl::DataLossError(absl::StrCat("the job is at step ", committed_step(),
                                          ", this worker has seen step ", min_committed_step,
                                          " committed; an operator must accept the rollback"));
}

void Leader::HandleJoin(const PendingJoin& pending, int64_t now_ms, Actions* actions) {
  if (persisting_) {  // an earlier one of the same batch began a write
    joins_.push_back(pending);
    return;
  }
  const JoinRequest& join = pending.join;
  absl::Status status = CheckMinCommitted(join.min_committed_step);
  if (status.ok()) status = gathering_.Check(join, record_.generation, record_.formed);
  if (!status.ok()) return Reply(pending.request, std::move(status), actions);
  if (join.generation == 0) {
    ++record_.generation;
    issuing_.push_back(pending.request);
    return Persist(actions);
  }
  if (join.generation > record_.formed) {
    for (auto& [request, refusal] :
         gathering_.Add(pending.request, join, spec_->tensors, options_.max_layout_bytes)) {
      Reply(request, std::move(refusal), actions);
    }
    return;
  }
  status = record_.layout == nullptr ? StaleGeneration(join.generation, record_.generation + 1)
                                     : CheckRepeatedJoin(join, *record_.layout);
  if (!status.ok()) return Reply(pending.request, std::move(status), actions);
  opening_.push_back(pending.request);
}

// A new generation closes the open attempt; a decision under way commits first.
void Leader::MaybeInstallGeneration(int64_t now_ms, Actions* actions) {
  if (gathering_.layout() == nullptr || decision_ != nullptr || persisting_) return;
  if (!std::exchange(installing_, true)) {
    record_.formed = gathering_.generation();
    record_.layout = gathering_.layout();
    Persist(actions);
  }
}

bool Leader::IsLost() const {
  if (phase_ != Phase::kCollect) return false;
  if (record_.rolling_back) return HaveAllReported() && !HoldsRollback();
  if (verdict_.outcome == Verdict::Outcome::kDamaged) return true;
  const auto is_gone = [this](const Copy& copy) {
    const auto& report = reports_[copy.server];
    return report.has_value() && report->incarnation != copy.incarnation;
  };
  return std::any_of(record_.in_sync.begin(), record_.in_sync.end(), [&](const auto& copies) {
    return !copies.empty() && std::all_of(copies.begin(), copies.end(), is_gone);
  });
}

void Leader::OnAcceptRollback(RequestId request, int64_t to_step, int64_t now_ms,
                              Actions* actions) {
  const bool is_lost = IsLost();
  const bool is_rolling_back = record_.rolling_back && !is_lost;
  if (is_rolling_back && record_.rollback_step == to_step && !deposed_) {
    return rollbacks_.push_back(request);  // a repeat of the one under way
  }
  if (deposed_ || persisting_ || is_rolling_back) return Reply(request, Recovering(), actions);
  if (phase_ == Phase::kServing && to_step == committed_step()) {
    if (claimed_loss_ > committed_step() &&
        (record_.accepted_at != committed_step() || record_.accepted_loss < claimed_loss_)) {
      record_.accepted_at = committed_step();
      record_.accepted_loss = claimed_loss_;
      accepting_.push_back(request);
      return Persist(actions);
    }
    if (record_.accepted_at == to_step) return Reply(request, absl::OkStatus(), actions);
  }
  std::vector<RecoverReport::Flush> offers;
  if (is_lost) offers = RollbackOffers(*spec_, reports_);
  for (const auto& offer : offers) {
    if (offer.step != to_step) continue;
    ReplyAll(&rollbacks_,
             absl::DataLossError(absl::StrCat("replaced by a rollback to step ", to_step)),
             actions);
    record_.rolling_back = true;
    record_.rollback_step = offer.step;
    record_.rollback_digest = offer.decision;
    rollbacks_.push_back(request);
    return BeginEpoch(now_ms, actions);
  }
  if (phase_ != Phase::kServing && !has_lost_memory()) {
    return Reply(request, absl::UnavailableError("not every server has told what it holds yet"),
                 actions);
  }
  std::string text = "nothing that was committed is known to be lost: no rollback";
  if (is_lost) text = "no flush is common to all shards: nothing to roll back to";
  if (!offers.empty()) {
    text = absl::StrCat("step ", to_step, " is not offered, a rollback to step ",
                        offers.front().step, " is");
  }
  Reply(request, Because(UnfitStep(committed_step()), absl::FailedPreconditionError(text)),
        actions);
}

// ---- Commits ---------------------------------------------------------------------------------

absl::Status Leader::CheckCommit(const CommitRequest& commit) const {
  if (deposed_) return absl::UnavailableError("another server leads the job now");
  if (phase_ != Phase::kServing || installing_) {
    return installing_ ? absl::UnavailableError("the job is changing its contributors")
                       : Recovering();
  }
  if (commit.epoch != 0 && commit.epoch < record_.epoch) {
    return StaleEpoch(commit.epoch, record_.epoch);
  }
  if (record_.layout == nullptr || commit.generation > record_.formed) {
    return Because(commit.generation > record_.formed ? Reason::kStaleGeneration : Reason::kLoading,
                   absl::FailedPreconditionError(
                       absl::StrCat("generation ", commit.generation, " has not formed")));
  }
  if (commit.generation < record_.formed) {
    return StaleGeneration(commit.generation, record_.formed);
  }
  if (commit.step != step()) {
    return Because(UnfitStep(committed_step()),
                   absl::FailedPreconditionError(absl::StrCat(
                       "CommitStep of step ", commit.step, ", step ", step(), " is being made")));
  }
  if (commit.attempt != attempt_) {
    const char* where = commit.attempt < attempt_ ? " is over, " : " is not open yet, ";
    std::string text =
        absl::StrCat("attempt ", commit.attempt, " of step ", step(), where, attempt_, " is open");
    if (commit.step == last_failure_.step && commit.attempt == last_failure_.attempt) {
      absl::StrAppend(&text, ": ", last_failure_.why);
    }
    return Because(Reason::kStaleAttempt, absl::AbortedError(text));
  }
  if (!commit.is_load && committed_ == nullptr) {
    return Because(Reason::kLoading,
                   absl::FailedPreconditionError("the job is LOADING: its first step is a LOAD"));
  }
  if (commit.is_load && !commit.absent.empty()) {
    return Because(
        Reason::kHyperParameters,
        absl::InvalidArgumentError("a LOAD has no absent tensors: what it does not set stays"));
  }
  std::vector<const CommitRequest*> by_rank;
  by_rank.reserve(commits_.size());
  for (const Commit& other : commits_) by_rank.push_back(other.present ? &other.request : nullptr);
  return CompareCommits(*spec_, commit, by_rank);
}

void Leader::OnCommitStep(RequestId request, const CommitRequest& commit, int64_t now_ms,
                          Actions* actions) {
  const bool is_repeated = phase_ == Phase::kServing && !deposed_ && committed_ != nullptr &&
                           commit.step == committed_->step &&
                           commit.attempt == committed_->attempt &&
                           commit.generation == committed_->generation;
  if (is_repeated) {
    absl::Status same = absl::OkStatus();
    if (committed_request_.has_value() && committed_request_->step == commit.step) {
      same = CompareGroups(commit, *committed_request_);
    }
    return same.ok() ? ReplyCommitted(request, actions) : Reply(request, std::move(same), actions);
  }
  absl::Status status = Damage();
  if (status.ok() || commit.step <= committed_step()) status = CheckCommit(commit);
  if (!status.ok()) return Reply(request, std::move(status), actions);
  Commit& slot = commits_[commit.rank];
  slot.present = true;
  slot.request = commit;
  slot.waiting.push_back(request);
  Advance(now_ms, actions);
}

absl::Status Leader::Damage() const {
  for (const Server& server : servers_) {
    if (!server.damage.ok()) return server.damage;
  }
  return absl::OkStatus();
}

bool Leader::AllCommitted() const {
  return !commits_.empty() && std::all_of(commits_.begin(), commits_.end(),
                                          [](const Commit& commit) { return commit.present; });
}

void Leader::On(ServerId from, const AbsentReply& message, int64_t now_ms, Actions* actions) {
  if (phase_ != Phase::kServing || message.step != step() || message.attempt != attempt_) return;
  if (message.rank < 0 || message.rank >= static_cast<Rank>(commits_.size())) return;
  if (!message.status.ok() && commits_[message.rank].present) {
    OpenNextAttempt(message.status, actions);
    return Advance(now_ms, actions);
  }
  servers_[from].absent_known[message.rank] = 1;
  Resend(from);
  Advance(now_ms, actions);
}

void Leader::On(ServerId from, const SealReply& message, int64_t now_ms, Actions* actions) {
  if (phase_ != Phase::kServing || message.step != step() || message.attempt != attempt_) return;
  if (!message.status.ok()) {
    if (decision_ != nullptr) return;
    FailAttempt(message.status, actions);
    return Advance(now_ms, actions);
  }
  servers_[from].sealed = true;
  Resend(from);
  Advance(now_ms, actions);
}

void Leader::On(ServerId from, const StageReport& message, int64_t now_ms, Actions* actions) {
  actions->push_back(
      Send{from, StageReply{message.epoch, message.step, message.attempt, message.is_load}});
  if (phase_ != Phase::kServing && phase_ != Phase::kOpen) return;
  if (message.generation != record_.formed || message.step != step() ||
      message.attempt != attempt_) {
    return;
  }
  std::optional<StageReport>& staged = servers_[from].staged;
  // A server without gradients reports before the Seal, too. The later report may arrive first.
  if (staged.has_value() && staged->is_load && !message.is_load) return;
  staged = message;
  Advance(now_ms, actions);
}

// ---- Decisions -------------------------------------------------------------------------------

void Leader::MaybeDecide(int64_t now_ms, Actions* actions) {
  if (decision_ != nullptr || installing_ || persisting_ || !AllCommitted()) return;
  if (!AllServers(&Server::opened)) return;
  const bool is_load = commits_[0].request.is_load;
  for (ServerId server = 0; server < spec_->server_count; ++server) {
    if (!HoldsInSync(server)) continue;
    const Server& state = servers_[server];
    if (!state.staged.has_value() || state.staged->is_load != is_load) return;
    if (is_load && !state.sealed) return;
    for (const Commit& commit : commits_) {
      if (!commit.request.absent.empty() && !state.absent_known[commit.request.rank]) return;
    }
  }
  DecisionInputs inputs{
      spec_.get(), record_.epoch, record_.formed,       step(),
      attempt_,    committed_,    &commits_[0].request, static_cast<int>(commits_.size()),
      {}};
  for (const Server& server : servers_) {
    inputs.reports.push_back(server.staged.has_value() ? &*server.staged : nullptr);
  }
  absl::StatusOr<DecisionPtr> decision = BuildDecision(inputs, build_scalars_);
  if (!decision.ok()) {
    if (absl::IsDataLoss(decision.status())) return FailAttempt(decision.status(), actions);
    return FailCommits(decision.status(), actions);
  }
  decision_ = *std::move(decision);
  for (Server& server : servers_) {
    server.prepared = false;
    server.sent_ms = INT64_MIN / 2;
  }
}

void Leader::On(ServerId from, const Prepared& message, int64_t now_ms, Actions* actions) {
  const DecisionPtr& wanted = phase_ == Phase::kPrepare ? committed_ : decision_;
  if (phase_ != Phase::kPrepare && phase_ != Phase::kServing) return;
  if (wanted == nullptr || message.decision != wanted->identity) return;
  if (!message.status.ok()) {
    if (phase_ != Phase::kServing) return;
    recovery_cause_ = absl::StrCat("server ", from, " cannot prepare step ", message.step, ": ",
                                   message.status.message());
    last_failure_ = {step(), attempt_, recovery_cause_};
    // The record may be prepared elsewhere: only a recovery may tell.
    return BeginEpoch(now_ms, actions);
  }
  servers_[from].prepared = true;
  Resend(from);
  Advance(now_ms, actions);
}

void Leader::MaybeCommit(int64_t now_ms, Actions* actions) {
  if (decision_ == nullptr || !AllServers(&Server::prepared)) return;
  committed_ = std::exchange(decision_, nullptr);
  committed_request_ = commits_[0].request;
  attempt_ = 1;  // before the answers, which name the open attempt
  for (Commit& commit : commits_) {
    for (RequestId request : std::exchange(commit.waiting, {})) ReplyCommitted(request, actions);
  }
  ForgetAttempt();
  // Applying opens the next step's first attempt at each server by itself.
  for (Server& server : servers_) server.applied = false;
}

bool Leader::MayApply(int64_t now_ms) const {
  if (flush_ && flush_->step == committed_step() - 1) return false;
  return std::none_of(holds_.begin(), holds_.end(), [&](const auto& entry) {
    return entry.second.step == committed_step() - 1 && now_ms < entry.second.until_ms;
  });
}

void Leader::On(ServerId from, const Applied& message, int64_t now_ms, Actions* actions) {
  if (phase_ != Phase::kFinish && phase_ != Phase::kServing) return;
  if (committed_ == nullptr || message.decision != committed_->identity) return;
  servers_[from].damage = message.status;
  if (!message.status.ok()) {
    if (phase_ == Phase::kFinish) recovery_cause_ = std::string(message.status.message());
    FailCommits(message.status, actions);
    return Advance(now_ms, actions);
  }
  if (!message.done) return;
  servers_[from].applied = true;
  Resend(from);
  Advance(now_ms, actions);
}

void Leader::OnHold(RequestId request, const std::string& holder, int64_t held_step,
                    int64_t deadline_ms, int64_t now_ms, Actions* actions) {
  if (deposed_ || phase_ != Phase::kServing) {
    return Reply(request, Recovering(), actions);
  }
  std::erase_if(holds_, [&](const auto& entry) {
    return entry.second.until_ms <= now_ms || entry.second.step < committed_step() - 1;
  });
  if (deadline_ms <= now_ms) {
    holds_.erase(holder);
  } else {
    // The step before the committed one can still be held while a hold keeps its version
    // everywhere.
    const bool is_held = held_step == committed_step() - 1 && !MayApply(now_ms);
    if (held_step != committed_step() && !is_held) {
      const std::string text = absl::StrCat(
          "step ", held_step, " cannot be held, the job is at step ", committed_step());
      return Reply(request,
                   held_step < committed_step()
                       ? absl::OutOfRangeError(text)
                       : Because(UnfitStep(committed_step()), absl::FailedPreconditionError(text)),
                   actions);
    }
    if (holds_.size() >= kMaxHolders && !holds_.contains(holder)) {
      return Reply(request,
                   absl::ResourceExhaustedError(
                       absl::StrCat("the limit is ", kMaxHolders, " holders of a job")),
                   actions);
    }
    holds_[holder] = {held_step, std::min(deadline_ms, now_ms + options_.max_hold_ms)};
  }
  Reply(request, absl::OkStatus(), actions);
  Advance(now_ms, actions);
}

// ---- Flushes ---------------------------------------------------------------------------------

void Leader::OnFlush(RequestId request, int64_t now_ms, Actions* actions) {
  if (deposed_ || phase_ != Phase::kServing) return Reply(request, Recovering(), actions);
  if (committed_ == nullptr) {
    return Reply(request,
                 Because(Reason::kLoading,
                         absl::FailedPreconditionError("the job is LOADING: nothing to write")),
                 actions);
  }
  if (absl::Status damage = Damage(); !damage.ok()) return Reply(request, damage, actions);
  // The servers repeat the failure of a flush until a new epoch, in which they report theirs.
  if (!flush_ && failed_flush_ == committed_->identity) BeginEpoch(now_ms, actions);
  flush_requests_.push_back(request);
  if (phase_ != Phase::kServing) return;  // EnterServing goes on with it
  if (!flush_) {
    if (kept_flush_.decision == committed_->identity) return EndFlush(absl::OkStatus(), actions);
    flush_ = {committed_->step, committed_->identity};
    for (ServerId server = 0; server < spec_->server_count; ++server) {
      servers_[server].flushed = false;
      if (servers_[server].applied) Resend(server);
    }
  }
  Advance(now_ms, actions);
}

void Leader::On(ServerId from, const FlushReply& message, int64_t now_ms, Actions* actions) {
  if (!flush_ || message.decision != flush_->decision) return;
  if (!message.status.ok()) {
    failed_flush_ = flush_->decision;
    EndFlush(message.status, actions);
    return Advance(now_ms, actions);
  }
  servers_[from].flushed = true;
  Resend(from);
  if (AllServers(&Server::flushed)) {
    kept_flush_ = *flush_;
    EndFlush(absl::OkStatus(), actions);
    // The servers learn it, so that they may erase older ones. If the message is lost, the next
    // OpenJob tells them.
    for (ServerId server = 0; server < spec_->server_count && !installing_; ++server) {
      if (HoldsInSync(server)) actions->push_back(Send{server, OpenMessage()});
    }
  }
  Advance(now_ms, actions);
}

// Ends the flush under way, and answers those who wait for it.
void Leader::EndFlush(const absl::Status& status, Actions* actions) {
  const int64_t flushed = flush_ ? flush_->step : committed_step();
  flush_.reset();
  for (RequestId request : std::exchange(flush_requests_, {})) {
    Reply(request, status, actions);
    std::get<Answer>(actions->back()).position.committed_step = flushed;
  }
}

}  // namespace orlop::step
