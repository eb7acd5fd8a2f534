// One push, 4 of 8 (ARCHITECTURE.md); next: server/shards/piece_writer.cc
#include "server/runtime/job_runtime.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/checksum.h"
#include "base/mutex.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/durability/flush.h"
#include "server/job/contributions.h"
#include "server/job/job_model.h"
#include "server/job/slots.h"
#include "server/job/step_codec.h"
#include "server/runtime/apply_queue.h"
#include "server/runtime/environment.h"
#include "server/runtime/job_disk.h"
#include "server/runtime/job_opening.h"
#include "server/runtime/leader_shell.h"
#include "server/runtime/machine_shell.h"
#include "server/runtime/piece_intake.h"
#include "server/runtime/step_scalars.h"
#include "server/runtime/wait.h"
#include "server/shards/piece_writer.h"
#include "server/shards/shard_store.h"
#include "server/step/actions.h"
#include "server/step/check.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/messages.h"
#include "server/step/participant.h"
#include "server/tiers/tier.h"
#include "spdlog/spdlog.h"

namespace orlop::server {

using std::chrono::steady_clock;

JobRuntime::JobRuntime(const Environment& environment, std::shared_ptr<const JobModel> model,
                       int64_t record_version)
    : MachineShell(environment, model->job(),
                   std::make_shared<JobDisk>(environment.data, model->job(), record_version),
                   std::make_shared<LocalMessages>([this](const step::Message& message) {
                     OnMessage(environment_.self, message);
                   })),
      flush_room_(model->job(), environment.tiers, &environment.data->store()),
      model_(std::move(model)) {}

absl::StatusOr<std::shared_ptr<JobRuntime>> JobRuntime::Open(const Environment& environment,
                                                             v1::JobDefinition definition,
                                                             bool is_new) {
  absl::StatusOr<std::shared_ptr<const JobModel>> model = JobModel::Make(std::move(definition));
  if (!model.ok()) return model.status();
  absl::StatusOr<OpenedJob> opened = OpenJob(environment, **model, is_new);
  if (!opened.ok()) return opened.status();
  absl::StatusOr<step::JobRecord> record = ReadJobRecord(environment, **model);
  if (!record.ok()) return record.status();
  std::shared_ptr<JobRuntime> runtime(new JobRuntime(environment, *model, record->version));
  const std::shared_ptr<const step::Layout> layout = opened->layout;
  runtime->Restore(*std::move(opened));
  if (absl::Status room = runtime->TakeFlushRoom(**model, is_new); !room.ok()) return room;
  if (layout != nullptr)
    if (absl::Status room = runtime->HoldLayout(*layout); !room.ok()) return room;
  if (environment.is_leader()) {
    runtime->leader_ =
        std::make_unique<LeaderShell>(environment, *std::move(model), *std::move(record), runtime,
                                      runtime->disk_, runtime->local_);
  }
  return runtime;
}

void JobRuntime::Restore(OpenedJob opened) {
  shards_ = std::move(opened.shards);
  MutexLock lock(&mutex_);
  applies_ = std::make_unique<ApplyQueue>(
      model_->spec(), shards_.get(), environment_.pool,
      [this](int32_t shard, const step::DecisionPtr& decision, const absl::Status& status) {
        EndApply(shard, decision, status);
      });
  layout_ = std::move(opened.layout);
  participant_ = std::make_unique<step::Participant>(model_->spec(), environment_.self,
                                                     /*leader=*/0, opened.image, opened.incarnation,
                                                     step::ParticipantOptions());
}

uint64_t JobRuntime::FlushBytesAs(const JobModel& model) const {
  return FlushRoom::FlushBytes(shards_->BytesAs(model.Optimizers()),
                               shards_->layout().shards.size(), model.definition().ByteSizeLong());
}

// A stored job is opened all the same if the disk has become too small for its flushes.
absl::Status JobRuntime::TakeFlushRoom(const JobModel& model, bool is_new) {
  if (!model.definition().has_optimizer()) return absl::OkStatus();
  if (is_new) return flush_room_.Grow(FlushBytesAs(model));
  const absl::Status taken = flush_room_.Take(FlushBytesAs(model));
  if (!taken.ok())
    spdlog::warn("job {}: a flush may find no room: {}", job_, std::string(taken.message()));
  return absl::OkStatus();
}

absl::Status JobRuntime::Start() {
  if (absl::Status status = disk_->EraseCleanMark(); !status.ok()) return status;
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
  const bool is_deciding = leader_ != nullptr && !leader_->BeginConfigure();
  absl::Status status = BeginConfigure(**model, is_deciding);
  const bool has_begun = status.ok();
  const std::shared_ptr<const JobModel> before = this->model();
  if (has_begun) status = ConfigureShards(**model, *before);
  // The leader first: what is held may bring a decision about.
  if (leader_ != nullptr) leader_->EndConfigure(status.ok() ? *model : nullptr);
  if (has_begun) {
    Complete([&](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
      configuring_ = false;
      if (status.ok()) model_ = *model;
      for (const auto& [from, message] : std::exchange(held_, {}))
        participant_->OnMessage(from, message, now, actions);
    });
  }
  return status;
}

// From here on, until the new configuration is there, no step begins here, and no piece.
// `is_deciding`: the leader on this server has decided a step that may not be prepared here yet.
absl::Status JobRuntime::BeginConfigure(const JobModel& model, bool is_deciding) {
  MutexLock lock(&mutex_);
  const bool has_stepped = is_deciding || participant_->position().committed_step > 0 ||
                           participant_->prepared() != nullptr;
  if (has_stepped && !shards_->IsConfiguredAs(model.Optimizers())) {
    return MakeError(absl::StatusCode::kFailedPrecondition,
                     absl::StrCat("job '", job_, "' steps with another optimizer configuration"),
                     v1::ErrorDetail::CONFLICT);
  }
  configuring_ = true;
  return absl::OkStatus();
}

// Changes the shards' slots, and the room for their flushes. After an error both are as before.
absl::Status JobRuntime::ConfigureShards(const JobModel& model, const JobModel& before) {
  if (absl::Status room = flush_room_.Grow(FlushBytesAs(model)); !room.ok()) return room;
  const absl::Status configured = shards_->Configure(model.Optimizers());
  if (configured.ok()) {
    flush_room_.ShrinkTo(FlushBytesAs(model));
  } else {
    flush_room_.ShrinkTo(before.definition().has_optimizer() ? FlushBytesAs(before) : 0);
  }
  return configured;
}

// ---- Pieces ------------------------------------------------------------------------------------

step::KeyVerdict JobRuntime::CheckKey(const step::AttemptKey& key,
                                      const std::shared_ptr<Wakeup>& wakeup) {
  MutexLock lock(&mutex_);
  if (closed_) return {false, JobGone()};
  step::KeyVerdict verdict = participant_->CheckKey(key);
  if (verdict.is_later) sleepers_.push_back(wakeup);
  return verdict;
}

BegunPiece JobRuntime::BeginPiece(const PieceRequest& request,
                                  const std::shared_ptr<Wakeup>& wakeup) {
  if (absl::Status gone = environment_.data->presence(); !gone.ok()) return {false, gone, {}};
  PieceTicket ticket;
  {
    MutexLock lock(&mutex_);
    if (closed_) return {false, JobGone(), {}};
    step::KeyVerdict verdict = participant_->CheckKey(request.key);
    if (configuring_ && verdict.status.ok()) verdict = {true, BeingConfigured()};
    if (verdict.is_later) sleepers_.push_back(wakeup);
    if (verdict.status.ok()) verdict.status = CheckPiece(request, &ticket.piece);
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

absl::Status JobRuntime::CheckPiece(const PieceRequest& request, step::PushPiece* piece) const {
  absl::StatusOr<step::PushPiece> made = PieceOf(request, *model_, layout_.get());
  if (!made.ok()) return made.status();
  *piece = *std::move(made);
  bool is_stored = false;
  const absl::Status status = participant_->CheckPush(*piece, &is_stored);
  // Contents are compared when they are known.
  return absl::IsAlreadyExists(status) ? absl::OkStatus() : status;
}

absl::StatusOr<bool> JobRuntime::EndPiece(PieceTicket ticket, const Digest128& digest,
                                          const Wait& wait) {
  absl::StatusOr<PieceResult> result = ticket.writer->Finish(digest);
  if (!result.ok()) return result.status();
  ticket.piece.payload = result->digest;
  bool is_kept = false;
  absl::Status kept;
  const auto push = [&](step::RequestId id, int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    participant_->OnPush(id, ticket.piece, /*has_room=*/true, now, &is_kept, actions);
    if (!is_kept) return;
    kept = ticket.writer->Keep();
    if (times_.step != ticket.piece.key.step && first_byte_ms_ == 0) first_byte_ms_ = now;
  };
  const auto answer = Await(wait, [&](Caller caller) { return Ask(std::move(caller), push); });
  if (!answer.ok()) return answer.status();
  if (!kept.ok()) return kept;
  ticket.writer->Settle();
  return !is_kept;
}

step::RequestId JobRuntime::AskVersion(int32_t shard, int64_t version, Caller caller) {
  return Ask(
      std::move(caller),
      [&](step::RequestId id, int64_t now, step::Actions* actions)
          REQUIRES(mutex_) { participant_->OnPull(id, shard, version, now, actions); },
      [this](step::RequestId id, int64_t now, step::Actions* actions)
          REQUIRES(mutex_) { participant_->OnPullCancelled(id, now, actions); });
}

absl::StatusOr<JobRuntime::VersionPin> JobRuntime::PinOf(
    const absl::StatusOr<step::Answer>& answer) {
  if (absl::IsUnavailable(answer.status()) && leader_ != nullptr && leader_->HasLostMemory())
    return MakeError(
        absl::StatusCode::kDataLoss,
        absl::StrCat("job '", job_, "' has lost what was committed; Join tells what is left"),
        v1::ErrorDetail::LOST);
  if (!answer.ok()) return answer.status();
  return VersionPin(shared_from_this(), answer->request);
}

step::RequestId JobRuntime::AskVersion(int32_t shard, int64_t version,
                                       steady_clock::time_point deadline,
                                       std::function<void(absl::StatusOr<VersionPin>)> next) {
  return AskVersion(shard, version,
                    {[self = shared_from_this(), next = std::move(next)](
                         const absl::StatusOr<step::Answer>& answer) { next(self->PinOf(answer)); },
                     deadline});
}

absl::StatusOr<JobRuntime::VersionPin> JobRuntime::AwaitVersion(int32_t shard, int64_t version,
                                                                const Wait& wait) {
  return PinOf(
      Await(wait, [&](Caller caller) { return AskVersion(shard, version, std::move(caller)); }));
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
    for (const step::StagedPiece& piece : participant_->PiecesOf(shard.id)) {
      if (piece.key.rank == static_cast<step::Rank>(rank)) pieces.push_back(piece);
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

absl::Status JobRuntime::CheckPeerMessage(int from, const step::Message& message) const {
  const std::shared_ptr<const JobModel> model = this->model();
  int64_t epoch = position().epoch;
  if (leader_ != nullptr) epoch = std::max(epoch, leader_->epoch());
  absl::Status status = step::CheckMessage(*model->spec(), environment_.self, from, epoch, message);
  if (!status.ok()) return status;
  if (step::ForLeader(message) ? leader_ == nullptr : from != 0)
    return absl::InvalidArgumentError(absl::StrCat(
        "server ", from, " sent server ", environment_.self, " a message ",
        step::ForLeader(message) ? "for the step leader" : "that only the step leader sends"));
  if (const auto* prepare = std::get_if<step::Prepare>(&message))
    return DecisionScalars::Parse(*model, *prepare->decision).status();
  return absl::OkStatus();
}

absl::Status JobRuntime::OnPeerMessage(int from, const step::Message& message) {
  if (absl::Status status = CheckPeerMessage(from, message); !status.ok())
    return MakeError(absl::StatusCode::kInvalidArgument, std::string(status.message()),
                     v1::ErrorDetail::BAD_REQUEST);
  if (const auto* recover = std::get_if<step::Recover>(&message)) {
    const Digest128 here = model()->spec()->manifest_digest;
    is_foreign_ = recover->manifest_digest != here;
    if (is_foreign_) {
      v1::ErrorDetail detail;
      detail.set_reason(v1::ErrorDetail::QUARANTINED);
      detail.set_job(job_);
      detail.set_server(environment_.server_names[environment_.self]);
      return MakeError(absl::StatusCode::kFailedPrecondition,
                       absl::StrCat("server ", detail.server(), " has a job '", job_,
                                    "' with another manifest: its digest is ", ToString(here),
                                    ", the step leader's is ", ToString(recover->manifest_digest),
                                    "; delete the job, and create it anew"),
                       detail);
    }
  }
  OnMessage(from, message);
  return absl::OkStatus();
}

void JobRuntime::OnMessage(int from, const step::Message& message) {
  if (step::ForLeader(message)) {
    if (leader_ != nullptr) leader_->OnMessage(from, message);
    return;
  }
  Complete([&](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    if (configuring_) return held_.emplace_back(from, message), void();
    participant_->OnMessage(from, message, now, actions);
  });
}

void JobRuntime::OnPeerAnswer(int to, const v1::StepMessage& message, const absl::Status& answer) {
  const bool is_refusal = !answer.ok() && !absl::IsUnavailable(answer) &&
                          !absl::IsDeadlineExceeded(answer) && !absl::IsNotFound(answer);
  MutexLock lock(&mutex_);
  const std::pair<int, int> key{to, message.body_case()};
  if (answer.ok()) refusals_.erase(key);
  if (!is_refusal) return;
  refusals_[key] = answer;
  std::string& logged = logged_refusals_[key];
  if (logged == answer.message()) return;
  logged = std::string(answer.message());
  spdlog::error("job {}: a message of {} bytes to server {} is refused: {}", job_,
                message.ByteSizeLong(), environment_.server_names[to], logged);
}

std::map<int, absl::Status> JobRuntime::refusals() const {
  MutexLock lock(&mutex_);
  std::map<int, absl::Status> by_server;
  for (const auto& [key, status] : refusals_) by_server.emplace(key.first, status);
  return by_server;
}

void JobRuntime::Tick() {
  Complete([this](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    applies_->Retry(shared_from_this());
    *actions = TakeUnsynced();
    participant_->OnTick(now, actions);
  });
  ExpireCallers();
  if (leader_ != nullptr) leader_->Tick();
}

void JobRuntime::BeginStop() {
  // The Apply of a commit that was answered may be on its way from the leader: without it the flush
  // would be of the step before, with this one prepared.
  local_->AwaitDelivery();
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
    const bool is_applying = participant_->is_applying() && applies_->room_status().ok();
    if (flushing_ || is_applying) {
      changed_.Wait(&mutex_);
      continue;
    }
    if (!changed_.WaitUntil(&mutex_, deadline) && steady_clock::now() >= deadline) {
      if (absl::Status room = applies_->room_status(); !room.ok()) return room;
      if (absl::Status disk = disk_->status(); !disk.ok()) return disk;
      return absl::DeadlineExceededError(
          absl::StrCat("job '", job_, "' did not come to rest: it waits for another server"));
    }
  }
  return flush_status_;
}

void JobRuntime::Close() {
  disk_->Close();
  if (leader_ != nullptr) leader_->Close();
  CloseCallers();
  MutexLock lock(&mutex_);
  changed_.SignalAll();
  for (const std::shared_ptr<Wakeup>& sleeper : std::exchange(sleepers_, {})) sleeper->Wake();
}

void JobRuntime::Do(const step::Action& action) {
  std::visit([&](const auto& a) REQUIRES(mutex_) { Do(a); }, action);
}

void JobRuntime::AfterEvent() {
  changed_.SignalAll();
  if (!beginning_.empty()) {
    const int64_t step = beginning_.front().decision->step;
    if (step != committed_step_) committed_ms_ = now_ms();
    committed_step_ = step;
    const absl::Status begun =
        applies_->Begin(std::exchange(beginning_, {}), *model_, shared_from_this());
    if (!begun.ok()) spdlog::error("job {}: {}", job_, std::string(begun.message()));
  }
  for (const std::shared_ptr<Wakeup>& sleeper : std::exchange(sleepers_, {})) sleeper->Wake();
}

void JobRuntime::Do(const step::StartApply& action) { beginning_.push_back(action); }

void JobRuntime::Do(const step::Serve& action) { AnswerCaller({.request = action.request}); }

void JobRuntime::Do(const step::PersistEpoch& action) {
  environment_.pool->Submit([self = shared_from_this(), action] { self->PersistInPool(action); });
}

void JobRuntime::PersistInPool(const step::PersistEpoch& action) {
  const absl::Status status = disk_->WriteEpoch(action.epoch);
  Complete([&](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    if (action.epoch < participant_->epoch()) return;  // a higher one is on its way
    if (!status.ok()) return WriteAgain(action);
    environment_.tiers->set_epoch(static_cast<uint64_t>(action.epoch));
    participant_->OnEpochDurable(action.epoch, now, actions);
  });
}

void JobRuntime::Do(const step::DropStaged& action) {
  const step::DecisionPtr prepared = participant_->prepared();
  if (prepared != nullptr && prepared->step < action.step)
    return;  // what is staged belongs to the decision before
  shards_->DropStaged();
  first_byte_ms_ = staged_ms_ = 0;
}

void JobRuntime::Do(const step::TakeLayout& action) {
  environment_.pool->Submit([self = shared_from_this(), layout = action.layout, model = model_] {
    self->TakeInPool(layout, *model);
  });
}

void JobRuntime::TakeInPool(const std::shared_ptr<const step::Layout>& layout,
                            const JobModel& model) {
  absl::Status taken = HoldLayout(*layout);
  if (taken.ok()) taken = shards_->SetLayout(PiecesFor(model, shards_->layout(), *layout));
  if (!taken.ok())
    spdlog::error("job {}: no room for the layout: {}", job_, std::string(taken.message()));
  Complete([&](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    layout_ = layout;
    participant_->OnLayoutTaken(layout->digest, taken, now, actions);
  });
}

// Counts the memory of a layout: the leader and the participant keep it as it is, the participant
// and the shards the pieces that follow from it.
absl::Status JobRuntime::HoldLayout(const step::Layout& layout) {
  uint64_t bytes = 0;
  for (const auto& rank : layout.by_rank) bytes += step::HeldBytes(rank);
  const Use use{Tier::kDram, job_, "layout"};
  absl::StatusOr<Reservation> room = environment_.tiers->Reserve(use, 3 * bytes);
  if (!room.ok()) return room.status();
  room->SetUsed(3 * bytes).IgnoreError();  // cannot fail: that much is reserved
  MutexLock lock(&mutex_);
  layout_room_ = *std::move(room);
  return absl::OkStatus();
}

void JobRuntime::Do(const step::StageShard& action) {
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

void JobRuntime::Do(const step::LoadFlush& action) {
  applies_->Clear();
  environment_.pool->Submit([self = shared_from_this(), action] { self->LoadFlushInPool(action); });
}

void JobRuntime::LoadFlushInPool(const step::LoadFlush& action) {
  absl::Status status = LoadFlush(environment_.data->store(), job_, action.step,
                                  /*with_staged=*/false, shards_.get());
  const step::DecisionPtr decision =
      status.ok() ? FlushedDecision(environment_, *model(), action.step) : nullptr;
  if (status.ok() && (decision == nullptr || decision->identity != action.decision))
    status = absl::DataLossError("the flush is not of that decision");
  if (!status.ok())
    spdlog::error("job {}: the flush of step {} cannot be loaded: {}", job_, action.step,
                  std::string(status.message()));
  Complete([&](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    participant_->OnFlushRestored(action.decision, decision, status, now, actions);
  });
}

void JobRuntime::Do(const step::WriteFlush& action) {
  flushing_ = true;
  ++flush_count_;
  environment_.flush_line->Submit(
      environment_.pool, [self = shared_from_this(), action] { self->WriteFlushInPool(action); });
}

void JobRuntime::WriteFlushInPool(const step::WriteFlush& action) {
  FlushHeader header;
  {
    MutexLock lock(&mutex_);
    step::ParticipantImage image = participant_->Image();
    if (!action.is_stop) {  // what is staged is not written
      image.pieces.clear();
      image.absent.clear();
      image.prepared = nullptr;
      image.attempt = 0;
    }
    header.job = job_;
    header.step = image.last_applied == nullptr ? step::kLoading : image.last_applied->step;
    header.manifest = model_->definition().manifest().SerializeAsString();
    header.optimizer = model_->definition().optimizer().SerializeAsString();
    const bool has_room = !image.layout.empty();  // for layout_
    header.machine = Serialize(image, has_room ? layout_.get() : nullptr);
  }
  bool has_erased = false;
  absl::Status status = WriteFlushOf(header, action, &has_erased);
  if (status.ok() && action.is_stop) status = disk_->WriteCleanMark();
  if (!status.ok())
    spdlog::error("job {}: step {} cannot be written to disk: {}", job_, header.step,
                  std::string(status.message()));
  Complete([&](int64_t now, step::Actions* actions) REQUIRES(mutex_) {
    flushing_ = false;
    if (action.is_stop) flush_status_ = status;
    participant_->OnFlushed(status, has_erased, now, actions);
  });
}

absl::Status JobRuntime::WriteFlushOf(const FlushHeader& header, const step::WriteFlush& action,
                                      bool* has_erased) {
  MutexLock lock(&flush_mutex_);
  if (absl::Status room = flush_room_.TakeMore(FlushBytesAs(*model())); !room.ok())
    spdlog::warn("job {}: a flush may find no room: {}", job_, std::string(room.message()));
  absl::Status status =
      flush_room_.MakeRoom(action.needed, /*with_staged=*/action.is_stop, has_erased);
  if (status.ok())
    status = WriteFlush(&environment_.data->store(), header, /*with_staged=*/action.is_stop,
                        shards_.get());
  if (!status.ok()) {
    flush_room_.Count();
    return status;
  }
  std::vector<int64_t> steps = action.keep;
  steps.push_back(header.step);
  KeepFlushesOf(steps);
  return status;
}

void JobRuntime::Do(const step::KeepFlushes& action) {
  environment_.pool->Submit([self = shared_from_this(), action, count = flush_count_.load()] {
    MutexLock lock(&self->flush_mutex_);
    if (count == self->flush_count_) self->KeepFlushesOf(action.keep);  // later ones keep their own
  });
}

// An old flush that cannot be erased costs only room, and the next one tries again.
void JobRuntime::KeepFlushesOf(const std::vector<int64_t>& steps) {
  const absl::Status erased = KeepFlushes(&environment_.data->store(), job_, steps);
  if (!erased.ok())
    spdlog::warn("job {}: flushes that are not needed any more stay on the disk: {}", job_,
                 std::string(erased.message()));
  flush_room_.Count();
}

// What only journals, further copies and the leader ask for. Jobs that need the first two are
// refused when they are created.
template <typename Other>
void JobRuntime::Do(const Other&) {
  spdlog::critical("job {}: an action that no job at level MEMORY has", job_);
}

}  // namespace orlop::server
