// Steps of a serving leader: generations, commits, decisions. Recovery is in leader_recovery.cc.
#include "server/step/leader.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "absl/strings/str_cat.h"

namespace orlop::step {
namespace {

bool SameRequest(const CommitRequest& a, const CommitRequest& b) {
  return a.is_load == b.is_load && a.groups == b.groups && a.absent == b.absent &&
         std::bit_cast<uint64_t>(a.scale) == std::bit_cast<uint64_t>(b.scale);
}

// Names the first hyper-parameter in which two contributors differ.
absl::Status CompareGroups(const CommitRequest& a, const CommitRequest& b) {
  if (a.groups.size() != b.groups.size()) {
    return absl::InvalidArgumentError(absl::StrCat("rank ", a.rank, " has ", a.groups.size(),
                                                   " parameter groups, rank ", b.rank, " has ",
                                                   b.groups.size()));
  }
  for (size_t group = 0; group < a.groups.size(); ++group) {
    const auto& left = a.groups[group].values;
    const auto& right = b.groups[group].values;
    if (left.size() != right.size()) {
      return absl::InvalidArgumentError(absl::StrCat("group ", group, ": ranks ", a.rank, " and ",
                                                     b.rank,
                                                     " send different sets of hyper-parameters"));
    }
    for (size_t i = 0; i < left.size(); ++i) {
      if (left[i] == right[i]) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          "group ", group, ": ", left[i].name, " differs: ", std::bit_cast<double>(left[i].bits),
          " from rank ", a.rank, ", ", std::bit_cast<double>(right[i].bits), " from rank ", b.rank,
          " before"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

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
  report.serving = phase_ == Phase::kServing && !deposed_;
  report.last_decision = committed_;
  report.in_sync = record_.in_sync;
  for (const Commit& commit : commits_) {
    if (commit.present) report.committed_ranks.push_back(commit.request.rank);
  }
  if (deposed_) {
    report.waiting_for = "another server leads the job now";
  } else if (phase_ == Phase::kCollect) {
    report.waiting_for = verdict_.reason.empty() ? "reports of servers:" : verdict_.reason;
    for (ServerId server = 0; server < spec_->server_count; ++server) {
      if (!reports_[server].has_value()) absl::StrAppend(&report.waiting_for, " ", server);
    }
    report.is_stuck = HaveAllReported();
    report.rollback_offers = RollbackOffers(*spec_, record_.in_sync, reports_);
  } else if (phase_ != Phase::kServing) {
    report.waiting_for = phase_ == Phase::kCatchUp ? "copies to catch up" : "recovery to finish";
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

void Leader::OnAbortStep(RequestId request, const AbortRequest& abort, int64_t now_ms,
                         Actions* actions) {
  if (deposed_ || phase_ != Phase::kServing) {
    return Reply(request, absl::UnavailableError("the job is recovering"), actions);
  }
  const bool is_over = abort.step <= step() && (abort.generation < record_.formed ||
                                                (abort.step == step() && abort.attempt < attempt_));
  const bool is_open =
      abort.step == step() && abort.generation == record_.formed && abort.attempt == attempt_;
  if (abort.step == committed_step() || (is_open && decision_ != nullptr)) {
    return Reply(request,
                 absl::FailedPreconditionError(absl::StrCat("step ", abort.step, " is decided")),
                 actions);
  }
  if (is_over || (abort.epoch != 0 && abort.epoch < record_.epoch)) {
    return Reply(request, absl::OkStatus(), actions);
  }
  if (!is_open) {
    return Reply(request,
                 absl::FailedPreconditionError(absl::StrCat("attempt ", abort.attempt, " of step ",
                                                            abort.step, " is not open")),
                 actions);
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
  joins_.push_back({request, join});
  Advance(now_ms, actions);
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
  if (status.ok() && (join.world_size < 1 || join.rank < 0 || join.rank >= join.world_size ||
                      (join.generation == 0 && join.rank != 0))) {
    status = absl::InvalidArgumentError(absl::StrCat(
        "rank ", join.rank, " of a world of ", join.world_size, ", generation ", join.generation));
  }
  if (status.ok() && (join.generation < 0 || join.generation > record_.generation)) {
    status = absl::FailedPreconditionError(
        absl::StrCat("generation ", join.generation, " was never issued"));
  }
  if (!status.ok()) return Reply(pending.request, std::move(status), actions);
  if (join.generation == 0) {
    ++record_.generation;
    issuing_.push_back(pending.request);
    return Persist(actions);
  }
  const int64_t newest = std::max(record_.formed, forming_.generation);
  if (join.generation < newest) {
    return Reply(pending.request,
                 absl::FailedPreconditionError(
                     absl::StrCat("generation ", join.generation, " is superseded by ", newest)),
                 actions);
  }
  if (join.generation > record_.formed) return GatherRank(pending, now_ms, actions);
  const Layout& layout = *record_.layout;
  if (join.world_size != layout.world_size() ||
      DigestContributions(layout.by_rank[join.rank]) != DigestContributions(join.contributions)) {
    return Reply(
        pending.request,
        absl::AlreadyExistsError(absl::StrCat("rank ", join.rank, " of generation ",
                                              join.generation, " has joined with another layout")),
        actions);
  }
  opening_.push_back(pending.request);
}

void Leader::GatherRank(const PendingJoin& pending, int64_t now_ms, Actions* actions) {
  const JoinRequest& join = pending.join;
  if (forming_.generation != join.generation) {
    ReplyAll(
        &forming_.waiting,
        absl::FailedPreconditionError(absl::StrCat("superseded by generation ", join.generation)),
        actions);
    forming_ = {};
    forming_.generation = join.generation;
    forming_.by_rank.resize(join.world_size);
  }
  if (join.world_size != static_cast<int>(forming_.by_rank.size())) {
    return Reply(
        pending.request,
        absl::InvalidArgumentError(absl::StrCat("world size ", join.world_size,
                                                ", other ranks said ", forming_.by_rank.size())),
        actions);
  }
  auto& part = forming_.by_rank[join.rank];
  if (part.has_value() && DigestContributions(*part) != DigestContributions(join.contributions)) {
    return Reply(
        pending.request,
        absl::AlreadyExistsError(absl::StrCat("rank ", join.rank, " of generation ",
                                              join.generation, " has joined with another layout")),
        actions);
  }
  part = join.contributions;
  forming_.waiting.push_back(pending.request);
  for (const auto& other : forming_.by_rank) {
    if (!other.has_value()) return;
  }
  auto layout = std::make_shared<Layout>();
  for (auto& other : forming_.by_rank) layout->by_rank.push_back(*other);
  layout->digest = DigestLayout(layout->by_rank);
  if (absl::Status status = ValidateLayout(spec_->tensors, *layout); !status.ok()) {
    ReplyAll(&forming_.waiting, status, actions);
    forming_ = {};
    return;
  }
  forming_.layout = std::move(layout);
}

// A new generation closes the open attempt; a decision under way commits first.
void Leader::MaybeInstallGeneration(int64_t now_ms, Actions* actions) {
  if (forming_.layout == nullptr || decision_ != nullptr || persisting_) return;
  if (!std::exchange(installing_, true)) {
    record_.formed = forming_.generation;
    record_.layout = forming_.layout;
    Persist(actions);
  }
}

void Leader::OnAcceptRollback(RequestId request, int64_t to_step, int64_t now_ms,
                              Actions* actions) {
  const bool all_reported = phase_ == Phase::kCollect && HaveAllReported();
  // A state that was accepted may be lost before every server is back at it.
  const bool is_rollback_lost = record_.rolling_back && all_reported && !HoldsRollback();
  if (record_.rolling_back && record_.rollback_step == to_step && !is_rollback_lost && !deposed_) {
    return rollbacks_.push_back(request);  // a repeat of the one under way
  }
  if (deposed_ || persisting_ || (record_.rolling_back && !is_rollback_lost)) {
    return Reply(request, absl::UnavailableError("the job is recovering"), actions);
  }
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
  bool is_lost = is_rollback_lost || verdict_.outcome == Verdict::Outcome::kDamaged;
  for (const std::vector<Copy>& copies : record_.in_sync) {
    is_lost |= !copies.empty() && std::all_of(copies.begin(), copies.end(), [&](const Copy& copy) {
      const auto& report = reports_[copy.server];
      return report.has_value() && report->incarnation != copy.incarnation;
    });
  }
  std::vector<RecoverReport::Flush> offers;
  if (phase_ == Phase::kCollect && is_lost) {
    offers = RollbackOffers(*spec_, record_.in_sync, reports_);
  }
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
  if (phase_ != Phase::kServing && !(all_reported && is_lost)) {
    return Reply(request, absl::UnavailableError("not every server has told what it holds yet"),
                 actions);
  }
  std::string text = "nothing that was committed is known to be lost: no rollback";
  if (is_lost) text = "no flush is common to all shards: nothing to roll back to";
  if (!offers.empty()) {
    text = absl::StrCat("step ", to_step, " is not offered, a rollback to step ",
                        offers.front().step, " is");
  }
  Reply(request, absl::FailedPreconditionError(text), actions);
}

// ---- Commits ---------------------------------------------------------------------------------

absl::Status Leader::CheckCommit(const CommitRequest& commit) const {
  if (deposed_ || phase_ != Phase::kServing || installing_) {
    return absl::UnavailableError("the job is recovering or changing its contributors");
  }
  if (commit.epoch != 0 && commit.epoch < record_.epoch) {
    return absl::AbortedError(absl::StrCat("CommitStep of epoch ", commit.epoch,
                                           ", the job is in epoch ", record_.epoch));
  }
  if (record_.layout == nullptr || commit.generation > record_.formed) {
    return absl::FailedPreconditionError(
        absl::StrCat("generation ", commit.generation, " has not formed"));
  }
  if (commit.generation < record_.formed) {
    return absl::AbortedError(
        absl::StrCat("generation ", commit.generation, " is superseded by ", record_.formed));
  }
  if (commit.step != step()) {
    return absl::FailedPreconditionError(
        absl::StrCat("CommitStep of step ", commit.step, ", step ", step(), " is being made"));
  }
  if (commit.attempt < attempt_) {
    return absl::AbortedError(absl::StrCat("attempt ", commit.attempt, " of step ", step(),
                                           " is over, ", attempt_, " is open"));
  }
  if (commit.attempt > attempt_) {
    return absl::AbortedError(absl::StrCat("attempt ", commit.attempt, " of step ", step(),
                                           " is not open yet, ", attempt_, " is open"));
  }
  if (!commit.is_load && committed_ == nullptr) {
    return absl::FailedPreconditionError("the job is LOADING: its first step is a LOAD");
  }
  if (commit.is_load && !commit.absent.empty()) {
    return absl::InvalidArgumentError("a LOAD has no absent tensors: what it does not set stays");
  }
  return CompareCommits(commit);
}

absl::Status Leader::CompareCommits(const CommitRequest& commit) const {
  if (commit.rank < 0 || commit.rank >= static_cast<Rank>(commits_.size())) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", commit.rank, " of a world of ", commits_.size()));
  }
  for (size_t i = 0; i < commit.absent.size(); ++i) {
    const TensorId tensor = commit.absent[i];
    if (tensor < 0 || tensor >= static_cast<TensorId>(spec_->tensors.size()) ||
        (i > 0 && commit.absent[i - 1] >= tensor)) {
      return absl::InvalidArgumentError(
          absl::StrCat("absent tensors must be known and ascending, got number ", tensor));
    }
  }
  const Commit& own = commits_[commit.rank];
  if (own.present && !SameRequest(own.request, commit)) {
    if (absl::Status same = CompareGroups(commit, own.request); !same.ok()) return same;
    return absl::AlreadyExistsError(absl::StrCat("rank ", commit.rank, " has committed step ",
                                                 step(), " attempt ", attempt_,
                                                 " with other values"));
  }
  for (const Commit& other : commits_) {
    if (!other.present) continue;
    if (other.request.is_load != commit.is_load) {
      return absl::InvalidArgumentError(absl::StrCat("ranks ", other.request.rank, " and ",
                                                     commit.rank, " commit a LOAD and a step"));
    }
    if (std::bit_cast<uint64_t>(other.request.scale) != std::bit_cast<uint64_t>(commit.scale)) {
      return absl::InvalidArgumentError(absl::StrCat("scale ", commit.scale, " of rank ",
                                                     commit.rank, ", rank ", other.request.rank,
                                                     " has ", other.request.scale));
    }
    return CompareGroups(commit, other.request);
  }
  return absl::OkStatus();
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
  if (absl::Status status = CheckCommit(commit); !status.ok()) {
    return Reply(request, std::move(status), actions);
  }
  Commit& slot = commits_[commit.rank];
  slot.present = true;
  slot.request = commit;
  slot.waiting.push_back(request);
  Advance(now_ms, actions);
}

bool Leader::AllCommitted() const {
  return !commits_.empty() && std::all_of(commits_.begin(), commits_.end(),
                                          [](const Commit& commit) { return commit.present; });
}

void Leader::On(ServerId from, const AbsentReply& message, int64_t now_ms, Actions* actions) {
  if (phase_ != Phase::kServing || message.step != step() || message.attempt != attempt_) return;
  if (message.rank < 0 || message.rank >= static_cast<Rank>(commits_.size())) return;
  if (!message.status.ok() && commits_[message.rank].present) {
    return OpenNextAttempt(message.status, actions);
  }
  servers_[from].absent_known[message.rank] = 1;
  Resend(from);
  Advance(now_ms, actions);
}

void Leader::On(ServerId from, const SealReply& message, int64_t now_ms, Actions* actions) {
  if (phase_ != Phase::kServing || message.step != step() || message.attempt != attempt_) return;
  if (!message.status.ok()) return OpenNextAttempt(message.status, actions);
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
  servers_[from].staged = message;
  Advance(now_ms, actions);
}

// ---- Decisions -------------------------------------------------------------------------------

// One entry per shard; its copies must have staged the same bytes.
absl::Status Leader::CombineStaged(std::vector<const ShardStaged*>* staged) const {
  staged->assign(spec_->shards.size(), nullptr);
  for (const Server& server : servers_) {
    if (!server.staged.has_value()) continue;
    for (const ShardStaged& shard : server.staged->shards) {
      const ShardStaged*& known = (*staged)[shard.shard];
      if (known == nullptr) known = &shard;
      if (known->digest == shard.digest && known->absent == shard.absent) continue;
      return absl::DataLossError(
          absl::StrCat("shard ", shard.shard, ": its copies have staged different bytes"));
    }
  }
  return absl::OkStatus();
}

absl::Status Leader::CheckScales(double* scale) const {
  *scale = commits_[0].request.scale;
  for (ServerId server = 0; server < spec_->server_count; ++server) {
    const auto& report = servers_[server].staged;
    if (!report.has_value() || !report->has_scale || report->is_load) continue;
    if (std::bit_cast<uint64_t>(report->scale) == std::bit_cast<uint64_t>(*scale)) continue;
    return absl::InvalidArgumentError(absl::StrCat("gradients on server ", server, " carry scale ",
                                                   report->scale, ", CommitStep says ", *scale));
  }
  return absl::OkStatus();
}

// Fills untouched and applied_count.
absl::Status Leader::CountTensors(const std::vector<const ShardStaged*>& staged,
                                  DecisionRecord* decision) const {
  const size_t tensors = spec_->tensors.size();
  decision->untouched.assign(tensors, 1);
  std::vector<int64_t> loaded(tensors, -1);
  for (size_t shard = 0; shard < staged.size(); ++shard) {
    const TensorId tensor = spec_->shards[shard].tensor;
    if (!staged[shard]->absent) decision->untouched[tensor] = 0;
    const int64_t count = staged[shard]->loaded_applied_count;
    if (count >= 0 && loaded[tensor] >= 0 && loaded[tensor] != count) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", spec_->tensors[tensor].name,
                                                     ": applied_count ", loaded[tensor], " and ",
                                                     count, " in one LOAD"));
    }
    loaded[tensor] = std::max(loaded[tensor], count);
  }
  decision->applied_count.assign(tensors, 0);
  if (committed_ != nullptr) decision->applied_count = committed_->applied_count;
  for (size_t tensor = 0; tensor < tensors; ++tensor) {
    if (decision->kind == DecisionKind::kLoad && loaded[tensor] >= 0) {
      decision->applied_count[tensor] = loaded[tensor];
    }
    if (decision->kind == DecisionKind::kApply && !decision->untouched[tensor]) {
      ++decision->applied_count[tensor];
    }
  }
  return absl::OkStatus();
}

absl::Status Leader::BuildDecision(DecisionRecord* decision) const {
  std::vector<const ShardStaged*> staged;
  if (absl::Status status = CombineStaged(&staged); !status.ok()) return status;
  if (absl::Status status = CheckScales(&decision->scale); !status.ok()) return status;
  decision->epoch = record_.epoch;
  decision->generation = record_.formed;
  decision->step = step();
  decision->attempt = attempt_;
  decision->arithmetic_version = spec_->arithmetic_version;
  if (committed_ != nullptr) decision->previous = committed_->identity;
  DigestBuilder digest;
  for (const ShardStaged* shard : staged) {  // manifest order: the number of servers changes no bit
    digest.Add(shard->digest);
    decision->sum_of_squares += shard->sum_of_squares;
    decision->non_finite_count += shard->non_finite_count;
  }
  decision->staged = digest.Finish();
  decision->kind = decision->non_finite_count > 0 ? DecisionKind::kSkip : DecisionKind::kApply;
  if (commits_[0].request.is_load) decision->kind = DecisionKind::kLoad;
  if (absl::Status status = CountTensors(staged, decision); !status.ok()) return status;
  if (decision->kind != DecisionKind::kApply) return absl::OkStatus();
  absl::StatusOr<std::string> scalars = build_scalars_(
      {decision->step, &commits_[0].request.groups, &decision->applied_count, &decision->untouched,
       decision->sum_of_squares, decision->scale, static_cast<int>(commits_.size())});
  if (!scalars.ok()) return scalars.status();
  decision->scalars = *std::move(scalars);
  return absl::OkStatus();
}

void Leader::MaybeDecide(int64_t now_ms, Actions* actions) {
  if (decision_ != nullptr || installing_ || persisting_ || !AllCommitted()) return;
  if (!AllServers(&Server::opened)) return;
  const bool is_load = commits_[0].request.is_load;
  for (ServerId server = 0; server < spec_->server_count; ++server) {
    if (!HoldsInSync(server)) continue;
    const Server& state = servers_[server];
    if (!state.staged.has_value() || state.staged->is_load != is_load) return;
    for (const Commit& commit : commits_) {
      if (!commit.request.absent.empty() && !state.absent_known[commit.request.rank]) return;
    }
  }
  auto decision = std::make_shared<DecisionRecord>();
  if (absl::Status status = BuildDecision(decision.get()); !status.ok()) {
    if (absl::IsDataLoss(status)) return OpenNextAttempt(status, actions);
    return FailCommits(status, actions);
  }
  decision->identity = Identify(*decision);
  decision_ = std::move(decision);
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
    // The record may be prepared elsewhere: only a recovery may tell.
    if (phase_ == Phase::kServing) BeginEpoch(now_ms, actions);
    return;
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
  return std::none_of(holds_.begin(), holds_.end(), [&](const auto& entry) {
    return entry.second.step == committed_step() - 1 && now_ms < entry.second.until_ms;
  });
}

void Leader::On(ServerId from, const Applied& message, int64_t now_ms, Actions* actions) {
  if (phase_ != Phase::kFinish && phase_ != Phase::kServing) return;
  if (committed_ == nullptr || message.decision != committed_->identity || !message.done) return;
  servers_[from].applied = true;
  Resend(from);
  Advance(now_ms, actions);
}

void Leader::OnHold(RequestId request, const std::string& holder, int64_t held_step,
                    int64_t deadline_ms, int64_t now_ms, Actions* actions) {
  if (deposed_ || phase_ != Phase::kServing) {
    return Reply(request, absl::UnavailableError("the job is recovering"), actions);
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
                   held_step < committed_step() ? absl::OutOfRangeError(text)
                                                : absl::FailedPreconditionError(text),
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

}  // namespace orlop::step
