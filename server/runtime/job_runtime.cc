// One push, 4 of 8 (ARCHITECTURE.md); next: server/shards/piece_writer.cc
#include "server/runtime/job_runtime.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/durability/flush.h"
#include "server/job/contributions.h"
#include "server/job/step_codec.h"
#include "server/runtime/job_opening.h"
#include "spdlog/spdlog.h"

namespace orlop::server {
namespace {

using std::chrono::steady_clock;

absl::Status JobGone(const std::string& job) {
  return MakeError(absl::StatusCode::kNotFound, absl::StrCat("job '", job, "' was deleted"),
                   v1::ErrorDetail::UNKNOWN_JOB);
}

}  // namespace

JobRuntime::JobRuntime(const Environment& environment, std::shared_ptr<const JobModel> model)
    : environment_(environment), job_(model->job()), model_(std::move(model)) {}

absl::StatusOr<std::shared_ptr<JobRuntime>> JobRuntime::Open(const Environment& environment,
                                                             v1::JobDefinition definition,
                                                             bool is_new) {
  absl::StatusOr<std::shared_ptr<const JobModel>> model = JobModel::Make(std::move(definition));
  if (!model.ok()) return model.status();
  std::shared_ptr<JobRuntime> runtime(new JobRuntime(environment, *model));
  if (absl::Status status = runtime->Restore(is_new); !status.ok()) return status;
  return runtime;
}

absl::Status JobRuntime::Restore(bool is_new) {
  absl::StatusOr<OpenedJob> opened = OpenJob(environment_, *model(), is_new);
  if (!opened.ok()) return opened.status();
  absl::StatusOr<step::JobRecord> record = ReadJobRecord(environment_, job_);
  if (!record.ok()) return record.status();
  {
    MutexLock lock(&disk_mutex_);
    record_version_ = record->version;
  }
  MutexLock lock(&mutex_);
  shards_ = std::move(opened->shards);
  applies_ = std::make_unique<ApplyQueue>(
      model_->spec(), shards_.get(), environment_.pool,
      [this](int32_t shard, const step::DecisionPtr& decision, const absl::Status& status) {
        EndApply(shard, decision, status);
      });
  if (opened->layout != nullptr) {
    layout_ = opened->layout;
    contributions_ = ContributionsPerElement(*model_, *layout_);
  }
  participant_ = std::make_unique<step::Participant>(
      model_->spec(), environment_.self,
      /*leader=*/0, opened->image, opened->incarnation, step::ParticipantOptions());
  if (environment_.is_leader()) StartLeader(*std::move(record));
  return absl::OkStatus();
}

void JobRuntime::StartLeader(step::JobRecord record) {
  // The leader's events call this, so it runs under mutex_.
  auto scalars = [this](const step::ScalarInputs& inputs)
                     REQUIRES(mutex_) -> absl::StatusOr<std::string> {
    const bool mean = model_->definition().optimizer().reduce() != "sum";
    if (mean && !contributions_.ok()) return contributions_.status();
    return BuildScalars(*model_, mean ? *contributions_ : 1, inputs);
  };
  leader_ = std::make_unique<step::Leader>(model_->spec(), environment_.self, std::move(record),
                                           scalars, step::LeaderOptions());
}

absl::Status JobRuntime::Start() {
  if (absl::Status status = environment_.data->EraseValue(CleanKey(job_)); !status.ok())
    return status;
  Tick();
  return absl::OkStatus();
}

std::shared_ptr<const JobModel> JobRuntime::model() const {
  MutexLock lock(&mutex_);
  return model_;
}

absl::Status JobRuntime::Configure(v1::JobDefinition definition) {
  absl::StatusOr<std::shared_ptr<const JobModel>> model = JobModel::Make(std::move(definition));
  if (!model.ok()) return model.status();
  {
    MutexLock lock(&mutex_);
    const bool has_stepped =
        participant_->position().committed_step > 0 || participant_->prepared() != nullptr;
    if (has_stepped && !shards_->IsConfiguredAs((*model)->Optimizers())) {
      return MakeError(absl::StatusCode::kFailedPrecondition,
                       absl::StrCat("job '", job_, "' steps with another optimizer configuration"),
                       v1::ErrorDetail::CONFLICT);
    }
    configuring_ = true;  // no step begins here, and no piece
  }
  const absl::Status configured = shards_->Configure((*model)->Optimizers());
  Complete([&](int64_t, step::Actions* actions) REQUIRES(mutex_) {
    configuring_ = false;
    if (configured.ok()) model_ = *std::move(model);
    for (const auto& [from, message] : std::exchange(held_, {})) Deliver(from, message, actions);
  });
  return configured;
}

int64_t JobRuntime::now_ms() const {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             steady_clock::now().time_since_epoch())
      .count();
}

// ---- Calls -------------------------------------------------------------------------------------

absl::StatusOr<step::Answer> JobRuntime::Ask(const Wait& wait, const Event& event,
                                             const Event& on_timeout) {
  auto waiter = std::make_shared<Waiter>();
  step::RequestId request = 0;
  std::vector<step::Send> messages;
  bool is_answered = false;
  {
    MutexLock lock(&mutex_);
    if (closed_) return JobGone(job_);
    request = next_request_++;
    waiters_[request] = waiter;
    step::Actions actions;
    event(request, now_ms(), &actions);
    Perform(std::move(actions));
    messages = std::exchange(outgoing_, {});
    is_answered = waiter->done;
    if (is_answered) waiters_.erase(request);
  }
  SendToPeers(messages);
  if (!is_answered)
    if (absl::Status status = Await(request, *waiter, wait, on_timeout); !status.ok())
      return status;
  if (!waiter->serve && !waiter->answer.status.ok()) return waiter->answer.status;
  return waiter->answer;
}

// Waits until the request is answered, and withdraws it if it is not.
absl::Status JobRuntime::Await(step::RequestId request, const Waiter& waiter, const Wait& wait,
                               const Event& on_timeout) {
  std::vector<step::Send> messages;
  absl::Status status;
  {
    MutexLock lock(&mutex_);
    while (!waiter.done && !wait.is_over())
      changed_.WaitUntil(&mutex_, std::min(wait.deadline, steady_clock::now() + kCancelPoll));
    waiters_.erase(request);
    if (waiter.done) return absl::OkStatus();
    step::Actions late;
    if (on_timeout) on_timeout(request, now_ms(), &late);
    Perform(std::move(late));
    messages = std::exchange(outgoing_, {});
    status = steady_clock::now() < wait.deadline
                 ? absl::CancelledError("the caller went away")
                 : absl::DeadlineExceededError(absl::StrCat(
                       "job '", job_, "': the deadline passed while waiting",
                       unsynced_status_.ok() ? "" : " for the disk: ", unsynced_status_.message()));
  }
  SendToPeers(messages);
  return status;
}

absl::Status JobRuntime::ClaimRank(const step::JoinRequest& join) {
  MutexLock lock(&mutex_);
  return closed_ ? JobGone(job_) : leader_->ClaimRank(join);
}

absl::StatusOr<step::Answer> JobRuntime::Join(const step::JoinRequest& join, const Wait& wait) {
  return Ask(wait, [&](step::RequestId id, int64_t now, step::Actions* actions) {
    leader_->OnJoin(id, join, now, actions);
  });
}
absl::StatusOr<step::Answer> JobRuntime::Commit(const step::CommitRequest& commit,
                                                const Wait& wait) {
  {
    MutexLock lock(&mutex_);
    if (configuring_)
      return absl::UnavailableError(absl::StrCat("job '", job_, "' is being configured"));
  }
  return Ask(wait, [&](step::RequestId id, int64_t now, step::Actions* actions) {
    leader_->OnCommitStep(id, commit, now, actions);
  });
}
absl::StatusOr<step::Answer> JobRuntime::Abort(const step::AbortRequest& abort, const Wait& wait) {
  return Ask(wait, [&](step::RequestId id, int64_t now, step::Actions* actions) {
    leader_->OnAbortStep(id, abort, now, actions);
  });
}
absl::StatusOr<step::Answer> JobRuntime::Hold(const std::string& holder, int64_t step,
                                              int64_t duration_ms, const Wait& wait) {
  return Ask(wait, [&](step::RequestId id, int64_t now, step::Actions* actions) {
    leader_->OnHold(id, holder, step, now + duration_ms, now, actions);
  });
}
absl::StatusOr<step::Answer> JobRuntime::AcceptRollback(int64_t to_step, const Wait& wait) {
  return Ask(wait, [&](step::RequestId id, int64_t now, step::Actions* actions) {
    leader_->OnAcceptRollback(id, to_step, now, actions);
  });
}

step::JobStatusReport JobRuntime::Status() const {
  MutexLock lock(&mutex_);
  return leader_->Status();
}

void JobRuntime::AwaitRecovery(const Wait& wait) const {
  MutexLock lock(&mutex_);
  while (!closed_) {
    const step::JobStatusReport report = leader_->Status();
    if (report.serving || report.has_lost_memory) return;
    const auto now = steady_clock::now();
    if (now >= wait.deadline || (wait.cancelled && wait.cancelled())) return;
    changed_.WaitUntil(&mutex_, std::min(wait.deadline, now + kCancelPoll));
  }
}

// ---- Pieces ------------------------------------------------------------------------------------

step::KeyVerdict JobRuntime::CheckKey(const step::AttemptKey& key,
                                      const std::shared_ptr<Wakeup>& wakeup) {
  MutexLock lock(&mutex_);
  if (closed_) return {false, JobGone(job_)};
  step::KeyVerdict verdict = participant_->CheckKey(key);
  if (verdict.is_later) sleepers_.push_back(wakeup);
  return verdict;
}

BegunPiece JobRuntime::BeginPiece(const PieceRequest& request,
                                  const std::shared_ptr<Wakeup>& wakeup) {
  PieceTicket ticket;
  {
    MutexLock lock(&mutex_);
    if (closed_) return {false, JobGone(job_), {}};
    step::KeyVerdict verdict = participant_->CheckKey(request.key);
    if (configuring_ && verdict.status.ok())
      verdict = {true,
                 absl::UnavailableError(absl::StrCat("job '", job_, "' is being configured"))};
    if (verdict.is_later) sleepers_.push_back(wakeup);
    if (verdict.status.ok()) verdict.status = CheckRequest(request, &ticket.piece);
    if (!verdict.status.ok()) return {verdict.is_later, std::move(verdict.status), {}};
  }
  auto writer =
      request.is_load
          ? shards_->BeginLoad(request.shard, request.slot, request.dtype, request.box)
          : shards_->BeginGradient(request.shard, static_cast<uint32_t>(request.rank),
                                   static_cast<int32_t>(ticket.piece.key.region), request.dtype);
  if (!writer.ok()) return {false, writer.status(), {}};
  ticket.writer = *std::move(writer);
  return {false, absl::OkStatus(), std::move(ticket)};
}

// Fills in the piece that the request is about.
absl::Status JobRuntime::CheckRequest(const PieceRequest& request, step::PushPiece* piece) const {
  const step::AttemptKey& key = request.key;
  piece->key = {key.generation, key.step, key.attempt, request.shard, request.rank, 0};
  piece->epoch = key.epoch;
  piece->is_load = request.is_load;
  piece->scale = request.loss_scale;
  piece->applied_count = request.applied_count;
  if (request.is_load) {
    piece->key.region = step::LoadRegion(SlotName(request.slot), request.box);
  } else {
    absl::StatusOr<int32_t> region = RegionOf(request);
    if (!region.ok()) return region.status();
    piece->key.region = static_cast<uint64_t>(*region);
  }
  bool is_stored = false;
  const absl::Status status = participant_->CheckPush(*piece, &is_stored);
  // Contents are compared when they are known.
  return absl::IsAlreadyExists(status) ? absl::OkStatus() : status;
}

// The index of the request's box among those that its rank contributes to the tensor.
absl::StatusOr<int32_t> JobRuntime::RegionOf(const PieceRequest& request) const {
  if (layout_ == nullptr)
    return absl::UnavailableError(
        absl::StrCat("job '", job_, "': no generation has formed here yet"));
  const auto rank = static_cast<size_t>(request.rank);
  if (rank >= layout_->by_rank.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", rank, " of a world of ", layout_->by_rank.size()));
  }
  const std::vector<step::Contribution>& own = layout_->by_rank[rank];
  const auto it = std::lower_bound(own.begin(), own.end(), static_cast<int32_t>(request.tensor),
                                   [](const step::Contribution& contribution, int32_t tensor) {
                                     return contribution.tensor < tensor;
                                   });
  if (it != own.end() && it->tensor == static_cast<int32_t>(request.tensor)) {
    const auto found = std::find(it->boxes.begin(), it->boxes.end(), request.box);
    if (found != it->boxes.end()) return static_cast<int32_t>(found - it->boxes.begin());
  }
  return absl::InvalidArgumentError(
      absl::StrCat("tensor '", model_->tensors()[request.tensor].name, "': box ",
                   ToString(request.box), " is not in the contribution layout of rank ", rank));
}

absl::StatusOr<bool> JobRuntime::EndPiece(PieceTicket ticket, const Digest128& digest,
                                          const Wait& wait) {
  absl::StatusOr<PieceResult> result = ticket.writer->Finish(digest);
  if (!result.ok()) return result.status();
  ticket.piece.payload = result->digest;
  bool is_kept = false;
  absl::Status kept;
  const auto answer =
      Ask(wait, [&](step::RequestId id, int64_t now, step::Actions* actions) REQUIRES(mutex_) {
        participant_->OnPush(id, ticket.piece, /*has_room=*/true, now, &is_kept, actions);
        if (!is_kept) return;
        kept = ticket.writer->Keep();
        if (times_.step != ticket.piece.key.step && first_byte_ms_ == 0) first_byte_ms_ = now;
      });
  if (!answer.ok()) return answer.status();
  if (!kept.ok()) return kept;
  ticket.writer->Settle();
  return !is_kept;
}

absl::StatusOr<JobRuntime::VersionPin> JobRuntime::AwaitVersion(int32_t shard, int64_t version,
                                                                const Wait& wait) {
  step::RequestId served = 0;
  const auto answer = Ask(
      wait,
      [&](step::RequestId id, int64_t now, step::Actions* actions) REQUIRES(mutex_) {
        served = id;
        participant_->OnPull(id, shard, version, now, actions);
      },
      [&](step::RequestId id, int64_t now, step::Actions* actions)
          REQUIRES(mutex_) { participant_->OnPullCancelled(id, now, actions); });
  if (absl::IsUnavailable(answer.status()) && is_leader() && HasLostMemory())
    return MakeError(
        absl::StatusCode::kDataLoss,
        absl::StrCat("job '", job_, "' has lost what was committed; Join tells what is left"),
        v1::ErrorDetail::LOST);
  if (!answer.ok()) return answer.status();
  return VersionPin(shared_from_this(), served);
}

void JobRuntime::Unpin(step::RequestId pull) {
  Complete([&](int64_t now, step::Actions* actions)
               REQUIRES(mutex_) { participant_->OnPullDone(pull, now, actions); });
}

std::vector<step::StagedPiece> JobRuntime::PiecesFrom(uint32_t rank, size_t* expected_count) const {
  MutexLock lock(&mutex_);
  std::vector<step::StagedPiece> pieces;
  *expected_count = 0;
  for (const OwnedShard& shard : shards_->layout().shards) {
    for (step::StagedPiece& piece : participant_->PiecesOf(shard.id)) {
      if (piece.key.rank == static_cast<step::Rank>(rank)) pieces.push_back(std::move(piece));
    }
  }
  if (layout_ != nullptr) {
    for (const ExpectedPiece& piece : PiecesFor(*model_, shards_->layout(), *layout_))
      *expected_count += piece.rank == rank;
  }
  return pieces;
}

step::Position JobRuntime::position() const {
  MutexLock lock(&mutex_);
  return participant_->position();
}
int64_t JobRuntime::incarnation() const {
  MutexLock lock(&mutex_);
  return participant_->incarnation();
}
bool JobRuntime::HasReported() const {
  MutexLock lock(&mutex_);
  return participant_->has_reported();
}
std::shared_ptr<const step::Layout> JobRuntime::layout() const {
  MutexLock lock(&mutex_);
  return layout_;
}
StepTimes JobRuntime::last_step() const {
  MutexLock lock(&mutex_);
  return times_;
}
int64_t JobRuntime::AppliedCount(uint32_t tensor) const {
  MutexLock lock(&mutex_);
  const step::DecisionPtr decision = participant_->last_applied();
  return decision == nullptr || tensor >= decision->applied_count.size()
             ? 0
             : decision->applied_count[tensor];
}

// ---- Events ------------------------------------------------------------------------------------

void JobRuntime::OnPeer(int from, const step::Message& message) {
  Complete([&](int64_t, step::Actions* actions)
               REQUIRES(mutex_) { Deliver(from, message, actions); });
}

void JobRuntime::Tick() {
  Complete([this](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    applies_->Retry(shared_from_this());
    *actions = std::exchange(unsynced_, {});
    participant_->OnTick(now, actions);
    if (leader_ != nullptr) leader_->OnTick(now, actions);
  });
}

void JobRuntime::Complete(const std::function<void(int64_t, step::Actions*)>& event) {
  std::vector<step::Send> messages;
  {
    MutexLock lock(&mutex_);
    if (closed_) return;
    step::Actions actions;
    event(now_ms(), &actions);
    Perform(std::move(actions));
    messages = std::exchange(outgoing_, {});
  }
  SendToPeers(messages);
}

void JobRuntime::SendToPeers(const std::vector<step::Send>& messages) {
  for (const step::Send& send : messages) {
    absl::StatusOr<v1::StepMessage> message = ToWire(send.message);
    if (!message.ok()) {
      spdlog::error("job {}: {}", job_, std::string(message.status().message()));
      continue;
    }
    message->set_job(job_);
    message->set_from(static_cast<uint32_t>(environment_.self));
    environment_.peers->Send(send.to, *std::move(message));
  }
}

void JobRuntime::BeginStop() {
  Complete([this](int64_t now, step::Actions* actions)
               REQUIRES(mutex_) { participant_->OnStop(now, actions); });
}

absl::Status JobRuntime::Stop(steady_clock::time_point deadline) {
  BeginStop();
  MutexLock lock(&mutex_);
  while (!participant_->stopped()) {
    if (closed_) return absl::OkStatus();
    if (!flush_status_.ok()) return flush_status_;
    if (absl::Status damage = participant_->damage(); !damage.ok())
      return damage;  // no version is whole: the flushes before stay
    if (flushing_) {
      changed_.Wait(&mutex_);
      continue;
    }
    if (!changed_.WaitUntil(&mutex_, deadline) && steady_clock::now() >= deadline) {
      if (absl::Status room = applies_->room_status(); !room.ok()) return room;
      if (!unsynced_status_.ok()) return unsynced_status_;
      return absl::DeadlineExceededError(
          absl::StrCat("job '", job_, "' did not come to rest: it waits for another server",
                       ", or its step is still being applied"));
    }
  }
  return flush_status_;
}

void JobRuntime::Close() {
  {
    MutexLock lock(&disk_mutex_);
    may_write_ = false;  // what is written later would be taken for a later job of this name
  }
  MutexLock lock(&mutex_);
  closed_ = true;
  for (auto& [request, waiter] : waiters_) {
    waiter->done = true;
    waiter->answer.status = JobGone(job_);
  }
  for (const std::shared_ptr<Wakeup>& sleeper : std::exchange(sleepers_, {})) sleeper->Wake();
  changed_.SignalAll();
}

void JobRuntime::Deliver(int from, const step::Message& message, step::Actions* more) {
  if (step::ForLeader(message) && leader_ != nullptr)
    leader_->OnMessage(from, message, now_ms(), more);
  const bool fenced = std::holds_alternative<step::Fenced>(message);
  if (!step::ForLeader(message) || fenced) {
    if (configuring_) return held_.emplace_back(from, message), void();
    participant_->OnMessage(from, message, now_ms(), more);
  }
}

// Carries actions out in order; events that they cause here at once add to the end of the line.
void JobRuntime::Perform(step::Actions actions) {
  std::deque<step::Action> line(std::make_move_iterator(actions.begin()),
                                std::make_move_iterator(actions.end()));
  std::vector<step::StartApply> applies;
  while (!line.empty()) {
    const step::Action action = std::move(line.front());
    line.pop_front();
    step::Actions more;
    if (const auto* apply = std::get_if<step::StartApply>(&action)) {
      applies.push_back(*apply);
    } else {
      std::visit([&](const auto& a) REQUIRES(mutex_) { Do(a, &more); }, action);
    }
    line.insert(line.end(), std::make_move_iterator(more.begin()),
                std::make_move_iterator(more.end()));
  }
  if (!applies.empty()) {
    if (applies.front().decision->step != committed_step_) committed_ms_ = now_ms();
    committed_step_ = applies.front().decision->step;
    const absl::Status begun = applies_->Begin(std::move(applies), *model_, shared_from_this());
    if (!begun.ok()) spdlog::error("job {}: {}", job_, std::string(begun.message()));
  }
  for (const std::shared_ptr<Wakeup>& sleeper : std::exchange(sleepers_, {})) sleeper->Wake();
  changed_.SignalAll();
}

void JobRuntime::Do(const step::Send& action, step::Actions* more) {
  if (action.to == environment_.self) return Deliver(environment_.self, action.message, more);
  outgoing_.push_back(action);
}

void JobRuntime::Do(const step::Answer& action, step::Actions*) {
  const auto it = waiters_.find(action.request);
  if (it == waiters_.end()) return;
  it->second->answer = action;
  it->second->done = true;
}

void JobRuntime::Do(const step::Serve& action, step::Actions*) {
  const auto it = waiters_.find(action.request);
  if (it == waiters_.end()) return;
  it->second->serve = it->second->done = true;
}

// The machines wait for their epoch and record without asking again, so a disk that refuses them is
// asked again with every tick, as for an apply that waits for room.
bool JobRuntime::IsSynced(const absl::Status& status, step::Action action) {
  if (!status.ok()) {
    if (unsynced_status_.ok())
      spdlog::error("job {}: waits for the disk: {}", job_, std::string(status.message()));
    unsynced_.push_back(std::move(action));
  }
  unsynced_status_ = status;
  return status.ok();
}

void JobRuntime::Do(const step::PersistEpoch& action, step::Actions*) {
  environment_.pool->Submit([self = shared_from_this(), action] { self->PersistInPool(action); });
}

void JobRuntime::PersistInPool(const step::PersistEpoch& action) {
  absl::Status status;
  {
    MutexLock lock(&disk_mutex_);
    if (!may_write_) return;
    status = environment_.data->PersistEpoch(job_, static_cast<uint64_t>(action.epoch));
  }
  Complete([&](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    if (action.epoch < participant_->epoch()) return;  // a higher one is on its way
    if (!IsSynced(status, action)) return;
    environment_.tiers->set_epoch(static_cast<uint64_t>(action.epoch));
    participant_->OnEpochDurable(action.epoch, now, actions);
  });
}

void JobRuntime::Do(const step::PersistRecord& action, step::Actions*) {
  environment_.pool->Submit([self = shared_from_this(), action] { self->PersistInPool(action); });
}

void JobRuntime::PersistInPool(const step::PersistRecord& action) {
  bool follows = false;
  absl::Status status;
  {
    MutexLock lock(&disk_mutex_);
    if (!may_write_) return;
    follows = action.record.version == record_version_ + 1;
    if (follows) status = environment_.data->PutValue(RecordKey(job_), Serialize(action.record));
    if (follows && status.ok()) record_version_ = action.record.version;
  }
  Complete([&](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    if (!follows || IsSynced(status, action))
      leader_->OnRecordPersisted(action.record.version, follows, now, actions);
  });
}

void JobRuntime::Do(const step::DropStaged& action, step::Actions*) {
  const step::DecisionPtr prepared = participant_->prepared();
  if (prepared != nullptr && prepared->step < action.step)
    return;  // what is staged belongs to the decision before
  shards_->DropStaged();
  first_byte_ms_ = staged_ms_ = 0;
}

void JobRuntime::Do(const step::TakeLayout& action, step::Actions*) {
  environment_.pool->Submit([self = shared_from_this(), layout = action.layout, model = model_] {
    self->TakeInPool(layout, *model);
  });
}

void JobRuntime::TakeInPool(const std::shared_ptr<const step::Layout>& layout,
                            const JobModel& model) {
  const absl::Status taken = shards_->SetLayout(PiecesFor(model, shards_->layout(), *layout));
  if (!taken.ok())
    spdlog::error("job {}: no room for the layout: {}", job_, std::string(taken.message()));
  const absl::StatusOr<int64_t> contributions = ContributionsPerElement(model, *layout);
  Complete([&](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    layout_ = layout;
    contributions_ = contributions;
    participant_->OnLayoutTaken(layout->digest, taken, now, actions);
  });
}

void JobRuntime::Do(const step::StageShard& action, step::Actions*) {
  environment_.pool->Submit([self = shared_from_this(), action,
                             stager = shards_->StagerOf(action.shard, action.is_load)] {
    self->StageInPool(action, stager());
  });
}

void JobRuntime::StageInPool(const step::StageShard& action,
                             const absl::StatusOr<StagedShard>& staged) {
  if (absl::IsAborted(staged.status())) return;  // dropped meanwhile: later attempts have their own
  Complete([&](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    if (!staged.ok()) {
      spdlog::warn("job {}: shard {} cannot be staged: {}", job_, action.shard,
                   std::string(staged.status().message()));
      participant_->OnShardStagingFailed(action.shard, action.step, action.attempt, staged.status(),
                                         now, actions);
      return;
    }
    staged_ms_ = now;
    step::ShardStaged report;
    report.shard = action.shard;
    report.digest = staged->digest;
    report.sum_of_squares = staged->sum_squares;
    report.non_finite_count = staged->nonfinite_count;
    report.absent = staged->absent;
    participant_->OnShardStaged(action.step, action.attempt, report, now, actions);
  });
}

void JobRuntime::EndApply(int32_t shard, const step::DecisionPtr& decision,
                          const absl::Status& status) {
  Complete([&](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    if (participant_->prepared() != decision) return;  // rolled back meanwhile
    if (!status.ok()) {  // committed all the same: this shard is lost until healed, others go on
      participant_->OnShardDamaged(shard, decision->step, status, now, actions);
      return spdlog::error("job {}: shard {} cannot apply step {}: {}", job_, shard, decision->step,
                           std::string(status.message()));
    }
    participant_->OnShardApplied(shard, decision->step, now, actions);
    if (first_byte_ms_ == 0) first_byte_ms_ = staged_ms_;
    times_ = {decision->step, (staged_ms_ - first_byte_ms_) / 1e3,
              (committed_ms_ - staged_ms_) / 1e3, (now - committed_ms_) / 1e3};
    if (participant_->prepared() == nullptr) first_byte_ms_ = 0;
  });
}

void JobRuntime::Do(const step::LoadFlush& action, step::Actions*) {
  applies_->Clear();
  environment_.pool->Submit([self = shared_from_this(), action] { self->LoadFlushInPool(action); });
}

void JobRuntime::LoadFlushInPool(const step::LoadFlush& action) {
  absl::Status status = LoadFlush(environment_.data->store(), job_, action.step,
                                  /*with_staged=*/false, shards_.get());
  const step::DecisionPtr decision =
      status.ok() ? FlushedDecision(environment_, job_, action.step) : nullptr;
  if (status.ok() && decision == nullptr) status = absl::DataLossError("the flush has no decision");
  if (!status.ok())
    spdlog::error("job {}: the flush of step {} cannot be loaded: {}", job_, action.step,
                  std::string(status.message()));
  Complete([&](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    participant_->OnFlushRestored(action.decision, decision, status, now, actions);
  });
}

void JobRuntime::Do(const step::WriteFlush&, step::Actions*) {
  flushing_ = true;
  environment_.pool->Submit([self = shared_from_this()] { self->WriteFlushInPool(); });
}

void JobRuntime::WriteFlushInPool() {
  FlushHeader header;
  {
    MutexLock lock(&mutex_);
    const step::ParticipantImage image = participant_->Image();
    header.job = job_;
    header.step = image.last_applied == nullptr ? step::kLoading : image.last_applied->step;
    header.manifest = model_->definition().manifest().SerializeAsString();
    header.optimizer = model_->definition().optimizer().SerializeAsString();
    const bool has_room = !image.layout.empty();  // for layout_
    header.machine = Serialize(image, has_room ? layout_.get() : nullptr);
  }
  absl::Status status = WriteFlush(&environment_.data->store(), header, shards_.get());
  if (status.ok()) status = environment_.data->PutValue(CleanKey(job_), "");
  Complete([&](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    flush_status_ = status;
    if (status.ok()) participant_->OnFlushed(now, actions);
  });
}

// Journals and further copies: jobs that need them are refused when they are created.
template <typename Other>
void JobRuntime::Do(const Other&, step::Actions*) {
  spdlog::critical("job {}: an action that no job at level MEMORY has", job_);
}

}  // namespace orlop::server
