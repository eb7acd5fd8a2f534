// What workers push and pull, until every shard of the server is staged.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "base/checksum.h"
#include "server/step/actions.h"
#include "server/step/identity.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/messages.h"
#include "server/step/participant.h"
#include "server/step/reason.h"

namespace orlop::step {
namespace {

bool Before(const StagedPiece& piece, const PieceKey& key) {
  return std::pair(piece.key.rank, piece.key.region) < std::pair(key.rank, key.region);
}

// Returns whether a copy's refusal of a forwarded piece is final. If not, the piece is sent again.
bool IsFinal(const absl::Status& status) {
  return absl::IsResourceExhausted(status) || absl::IsAlreadyExists(status) ||
         absl::IsInvalidArgument(status) || absl::IsDataLoss(status);
}

absl::Status NotOpen(const char* what, int64_t got, int64_t open) {
  return Because(Reason::kStaleAttempt,
                 absl::AbortedError(absl::StrCat("push for ", what, " ", got, ", open is ", open)));
}

absl::Status AnotherStep(int64_t step, int64_t committed_step) {
  return Because(UnfitStep(committed_step),
                 absl::FailedPreconditionError(absl::StrCat("push for step ", step, ", step ",
                                                            committed_step + 1, " is being made")));
}

// The verdict for a key that is ahead of this server. `status` is the answer if waiting is in vain.
KeyVerdict Later(absl::Status status) { return {true, std::move(status)}; }

}  // namespace

uint64_t LoadRegion(std::string_view slot, const Box& box) {
  DigestBuilder builder;
  builder.AddBytes(slot).Add(box.offset.size());
  for (uint64_t at : box.offset) builder.Add(at);
  for (uint64_t length : box.extent) builder.Add(length);
  return builder.Finish().low;
}

int Participant::LocalIndex(ShardId shard) const {
  if (shard < 0 || shard >= static_cast<ShardId>(local_index_.size())) return -1;
  return local_index_[shard];
}

bool Participant::IsInSync(ShardId shard) const {
  if (placement_ == nullptr) return false;
  const std::vector<Copy>& copies = (*placement_)[shard];
  return std::find(copies.begin(), copies.end(), Copy{self_, incarnation_}) != copies.end();
}

bool Participant::NamesEarlierLife(const Placement& placement) const {
  for (const std::vector<Copy>& copies : placement) {
    for (const Copy& copy : copies) {
      if (copy.server == self_ && copy.incarnation != incarnation_) return true;
    }
  }
  return false;
}

std::vector<ServerId> Participant::OtherCopies(ShardId shard) const {
  std::vector<ServerId> others;
  for (const Copy& copy : (*placement_)[shard]) {
    if (copy.server != self_) others.push_back(copy.server);
  }
  return others;
}

bool Participant::IsAbsent(Rank rank, TensorId tensor) const {
  for (const ParticipantImage::AbsentTensors& entry : absent_) {
    if (entry.rank == rank) {
      return std::binary_search(entry.tensors.begin(), entry.tensors.end(), tensor);
    }
  }
  return false;
}

void Participant::Reply(RequestId request, absl::Status status, Actions* actions) const {
  Answer answer;
  answer.request = request;
  answer.status = std::move(status);
  answer.position = position();
  actions->push_back(std::move(answer));
}

// ---- Opening ---------------------------------------------------------------------------------

void Participant::Obey(ServerId from, const OpenJob& message, int64_t now_ms, Actions* actions) {
  if (message.manifest_digest != spec_->manifest_digest) return;
  // The leader has the report of an earlier life, and this life's was lost.
  if (NamesEarlierLife(*message.placement)) return MaybeReport(actions);
  if (message.committed_step != committed_step_ || committed_) {
    // The message was overtaken, or has overtaken the Apply before it. It is answered only if it
    // repeats the open attempt.
    if (!opened_ || message.committed_step != committed_step_) return;
  }
  if (!committed_ && !flushing_) LearnKept(message.kept, actions);
  const auto wanted = std::pair(message.generation, message.attempt);
  const auto open = std::pair(generation_, attempt_);
  if (wanted < open || (prepared_ != nullptr && !committed_ && wanted != open)) return;
  if (wanted != open) {
    DropAttempt(actions);
    FailPendingPushes(absl::AbortedError("a new attempt was opened"), actions);
    FailWaitingPulls(absl::AbortedError("the attempt that was to make it is gone"), actions);
  }
  if (wanted != open || !opened_) {
    generation_ = message.generation;
    attempt_ = message.attempt;
    layout_ = message.layout;
    placement_ = message.placement;
    opened_ = true;
    if (std::all_of(shards_.begin(), shards_.end(),
                    [this](const Shard& shard) { return IsInSync(shard.id); })) {
      has_lost_memory_ = false;  // the job goes on with what this life holds
    }
    stage_report_due_ = false;
    for (Shard& shard : shards_) {
      shard.expected.clear();
      if (layout_ != nullptr) {
        shard.expected = ExpectedPieces(spec_->tensors, spec_->shards[shard.id], *layout_);
      }
      CheckStaged(&shard, actions);
    }
    MaybeSendStageReport(actions);
  }
  AnswerOpen(actions);
}

// Answers OpenJob if the shell has room for the layout; if not, requests it first.
void Participant::AnswerOpen(Actions* actions) {
  if (HasRoom()) {
    return SendToLeader(OpenReply{epoch_, generation_, committed_step_, attempt_, absl::OkStatus()},
                        actions);
  }
  if (!taking_layout_.empty()) return;  // its completion answers
  if (prepared_ != nullptr) return;     // its staged bytes are needed; the leader repeats itself
  taking_layout_ = layout_->digest;
  taken_layout_ = {};  // its room is given away
  actions->push_back(TakeLayout{layout_});
}

void Participant::OnLayoutTaken(const Digest& layout, absl::Status status, int64_t now_ms,
                                Actions* actions) {
  if (layout != taking_layout_) return;
  taking_layout_ = {};
  taken_layout_ = status.ok() ? layout : Digest{};
  layout_status_ = std::move(status);
  if (life_ != Life::kRunning) return MaybeFlush(actions);
  if (!opened_ || layout_ == nullptr) return;  // the OpenJob of a new epoch asks again
  const bool is_refused = layout_->digest == layout && !layout_status_.ok();
  if (!is_refused) return AnswerOpen(actions);
  SendToLeader(OpenReply{epoch_, generation_, committed_step_, attempt_, layout_status_}, actions);
}

void Participant::DropAttempt(Actions* actions) {
  for (Shard& shard : shards_) {
    shard.stage = Stage::kOpen;
    shard.staged = {};
    shard.pieces.clear();
  }
  if (actions != nullptr && attempt_ > 0) {
    actions->push_back(DropStaged{committed_step_ + 1, attempt_});
  }
  kind_ = Kind::kUndecided;
  has_pieces_ = false;
  sealed_ = false;
  has_scale_ = false;
  scale_ = 1.0;
  absent_.clear();
  stage_report_due_ = false;
  staging_failure_ = absl::OkStatus();
}

// ---- Pushes ----------------------------------------------------------------------------------

KeyVerdict Participant::CheckKey(const AttemptKey& key) const {
  KeyVerdict verdict = CompareKey(key);
  // A damaged version is committed but cannot be made, so no later one can be made either.
  const bool is_refused = !verdict.is_later && !verdict.status.ok();
  if (!is_refused && !damaged_.empty()) return {false, damage()};
  if (is_refused || verdict.is_later || HasRoom()) return verdict;
  if (taking_layout_.empty() && !layout_status_.ok()) return {false, layout_status_};
  return Later(absl::UnavailableError(absl::StrCat(
      "server ", self_, " is making room for the layout of generation ", generation_)));
}

KeyVerdict Participant::CompareKey(const AttemptKey& key) const {
  if (key.epoch != 0 && key.epoch < epoch_) return {false, StaleEpoch(key.epoch, epoch_)};
  if (key.generation != 0 && key.generation < generation_) {
    return {false, StaleGeneration(key.generation, generation_)};
  }
  if (life_ != Life::kRunning) return {false, absl::UnavailableError("the server is stopping")};
  if (!opened_) return {false, absl::UnavailableError("the job is recovering")};
  if (key.epoch > epoch_) {
    return {false, absl::UnavailableError("this server is behind the job's epoch")};
  }
  if (key.generation > generation_) {
    return Later(Because(Reason::kStaleGeneration,
                         absl::FailedPreconditionError(absl::StrCat("generation ", key.generation,
                                                                    " has not formed; generation ",
                                                                    generation_, " contributes"))));
  }
  if (layout_ == nullptr) {
    return {false, Because(Reason::kLoading,
                           absl::FailedPreconditionError("no generation has joined the job"))};
  }
  if (prepared_ != nullptr && key.step > prepared_->step) {
    return Later(
        absl::UnavailableError(absl::StrCat("step ", prepared_->step, " is still being applied")));
  }
  if (key.step != committed_step_ + 1) return {false, AnotherStep(key.step, committed_step_)};
  if (key.attempt == 0 || key.attempt == attempt_) return {};
  if (key.attempt < attempt_) return {false, NotOpen("attempt", key.attempt, attempt_)};
  return Later(Because(Reason::kStaleAttempt, absl::AbortedError(absl::StrCat(
                                                  "attempt ", key.attempt, " of step ", key.step,
                                                  " is not open; attempt ", attempt_, " is"))));
}

absl::Status Participant::CheckOpen(const PushPiece& piece) const {
  const PieceKey& key = piece.key;
  KeyVerdict verdict = CheckKey({piece.epoch, key.generation, key.step, key.attempt});
  if (verdict.is_later) return absl::UnavailableError(verdict.status.message());
  if (!verdict.status.ok()) return verdict.status;
  if (key.generation == 0) return NotOpen("generation", key.generation, generation_);
  if (key.attempt == 0) return NotOpen("attempt", key.attempt, attempt_);
  if (IsInSync(key.shard)) return absl::OkStatus();
  return absl::NotFoundError(
      absl::StrCat("shard ", key.shard, " has no in-sync copy on server ", self_));
}

absl::Status Participant::Unfit(const std::string& text) const {
  return Because(UnfitStep(committed_step_), absl::FailedPreconditionError(text));
}

absl::Status Participant::CheckPiece(const PushPiece& piece, const Shard& shard,
                                     bool* stored) const {
  const PieceKey& key = piece.key;
  const std::string& tensor = spec_->tensors[spec_->shards[shard.id].tensor].name;
  const auto at = std::lower_bound(shard.pieces.begin(), shard.pieces.end(), key, Before);
  if (at != shard.pieces.end() && at->key == key) {
    *stored = at->payload == piece.payload;
    if (*stored) return absl::OkStatus();
    return absl::AlreadyExistsError(absl::StrCat(
        "tensor ", tensor, " shard ", shard.id, " rank ", key.rank, " region ", key.region,
        ": pushed with payload ", ToString(at->payload), ", now ", ToString(piece.payload)));
  }
  if (prepared_ != nullptr || sealed_) {
    return Unfit(absl::StrCat("step ", key.step, " is decided"));
  }
  const Kind kind = piece.is_load ? Kind::kLoad : Kind::kGradients;
  if (kind == Kind::kGradients && committed_step_ == kLoading) {
    return Unfit("the job is LOADING: its first step is a LOAD");
  }
  if (kind_ != Kind::kUndecided && kind_ != kind) {
    return Unfit("gradients and SetState in one attempt");
  }
  if (key.rank < 0 || key.rank >= layout_->world_size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", key.rank, " of a world of ", layout_->world_size()));
  }
  if (piece.is_load) return absl::OkStatus();
  const bool expected =
      std::any_of(shard.expected.begin(), shard.expected.end(), [&](const ExpectedPiece& other) {
        return other.rank == key.rank && static_cast<uint64_t>(other.region) == key.region;
      });
  if (!expected || piece.applied_count >= 0) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", tensor, " shard ", shard.id,
                                                   ": region ", key.region, " of rank ", key.rank,
                                                   " is not in the contribution layout"));
  }
  if (IsAbsent(key.rank, spec_->shards[shard.id].tensor)) {
    return absl::AlreadyExistsError(
        absl::StrCat("tensor ", tensor, ": rank ", key.rank, " has called its gradient absent"));
  }
  if (has_scale_ && scale_ != piece.scale) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", tensor, ": loss scale ", piece.scale,
                                                   ", others of the attempt have ", scale_));
  }
  return absl::OkStatus();
}

absl::Status Participant::CheckPush(const PushPiece& piece, bool* stored) const {
  *stored = false;
  const int index = LocalIndex(piece.key.shard);
  if (index < 0) {
    return absl::NotFoundError(
        absl::StrCat("shard ", piece.key.shard, " is not placed on server ", self_));
  }
  if (absl::Status status = CheckOpen(piece); !status.ok()) return status;
  const ServerId primary = (*placement_)[piece.key.shard].front().server;
  if (primary != self_) {
    return absl::NotFoundError(absl::StrCat("shard ", piece.key.shard, ": the primary is server ",
                                            primary, ", not ", self_));
  }
  return CheckPiece(piece, shards_[index], stored);
}

void Participant::StorePiece(const PushPiece& piece, Shard* shard) {
  kind_ = piece.is_load ? Kind::kLoad : Kind::kGradients;
  has_pieces_ = true;
  if (!piece.is_load) {
    has_scale_ = true;
    scale_ = piece.scale;
  }
  const auto at = std::lower_bound(shard->pieces.begin(), shard->pieces.end(), piece.key, Before);
  shard->pieces.insert(at, {piece.key, piece.payload, piece.applied_count});
}

void Participant::OnPush(RequestId request, const PushPiece& piece, bool has_room, int64_t now_ms,
                         bool* keep, Actions* actions) {
  *keep = false;
  bool stored = false;
  absl::Status status = CheckPush(piece, &stored);
  if (status.ok() && !stored && !has_room) {
    status = absl::ResourceExhaustedError(
        absl::StrCat("no room to stage shard ", piece.key.shard, " on server ", self_));
  }
  if (!status.ok()) return Reply(request, std::move(status), actions);
  Shard& shard = shards_[LocalIndex(piece.key.shard)];
  if (!stored) {
    *keep = true;
    StorePiece(piece, &shard);
  }
  ForwardPiece(request, piece, now_ms, actions);
  if (stored) return;
  CheckStaged(&shard, actions);
  MaybeSendStageReport(actions);
}

void Participant::ForwardPiece(RequestId request, const PushPiece& piece, int64_t now_ms,
                               Actions* actions) {
  for (PendingPush& pending : pending_pushes_) {
    if (pending.forward.piece.key != piece.key) continue;
    pending.requests.push_back(request);
    return;
  }
  std::vector<ServerId> others = OtherCopies(piece.key.shard);
  if (others.empty() || prepared_ != nullptr) return Reply(request, absl::OkStatus(), actions);
  const Forward forward{epoch_, piece};
  for (ServerId to : others) actions->push_back(ForwardBytes{to, forward});
  pending_pushes_.push_back({forward, {request}, std::move(others), now_ms});
}

void Participant::OnForward(ServerId from, const Forward& forward, bool has_room, int64_t now_ms,
                            bool* keep, Actions* actions) {
  *keep = false;
  const int index = LocalIndex(forward.piece.key.shard);
  if (index < 0 || forward.epoch != epoch_ || !Joined()) return;  // sent again, or out of date
  bool stored = false;
  absl::Status status = CheckOpen(forward.piece);
  if (status.ok()) status = CheckPiece(forward.piece, shards_[index], &stored);
  if (status.ok() && !stored && !has_room) {
    status = absl::ResourceExhaustedError(
        absl::StrCat("no room to stage shard ", forward.piece.key.shard, " on server ", self_));
  }
  if (status.ok() && !stored) {
    *keep = true;
    StorePiece(forward.piece, &shards_[index]);
  }
  actions->push_back(Send{from, ForwardReply{epoch_, forward.piece.key, status}});
  if (!*keep) return;
  CheckStaged(&shards_[index], actions);
  MaybeSendStageReport(actions);
}

void Participant::OnForwardReply(ServerId from, const ForwardReply& reply, Actions* actions) {
  const auto at =
      std::find_if(pending_pushes_.begin(), pending_pushes_.end(),
                   [&](const PendingPush& push) { return push.forward.piece.key == reply.key; });
  if (at == pending_pushes_.end() || reply.epoch != epoch_) return;
  if (reply.status.ok()) std::erase(at->waiting, from);
  if (!at->waiting.empty() && !IsFinal(reply.status)) return;
  for (RequestId request : at->requests) Reply(request, reply.status, actions);
  pending_pushes_.erase(at);
}

void Participant::FailPendingPushes(const absl::Status& status, Actions* actions) {
  for (const PendingPush& push : pending_pushes_) {
    for (RequestId request : push.requests) Reply(request, status, actions);
  }
  pending_pushes_.clear();
}

// ---- Absent, sealed, staged ------------------------------------------------------------------

void Participant::Obey(ServerId from, const Absent& message, int64_t now_ms, Actions* actions) {
  if (!opened_ || message.generation != generation_ || message.step != committed_step_ + 1 ||
      message.attempt != attempt_) {
    return;
  }
  AbsentReply reply{epoch_, message.step, message.attempt, message.rank, absl::OkStatus()};
  const bool known = std::any_of(absent_.begin(), absent_.end(),
                                 [&](const auto& entry) { return entry.rank == message.rank; });
  if (absl::Status failure = AttemptFailure(); !failure.ok()) reply.status = std::move(failure);
  for (const Shard& shard : shards_) {
    const TensorId tensor = spec_->shards[shard.id].tensor;
    if (known || !std::binary_search(message.tensors.begin(), message.tensors.end(), tensor)) {
      continue;
    }
    for (const StagedPiece& piece : shard.pieces) {
      if (piece.key.rank != message.rank) continue;
      reply.status = absl::AlreadyExistsError(
          absl::StrCat("tensor ", spec_->tensors[tensor].name, ": rank ", message.rank,
                       " has pushed a gradient and calls it absent"));
    }
  }
  const bool accepted = reply.status.ok() && !known && kind_ != Kind::kLoad;
  SendToLeader(std::move(reply), actions);
  if (!accepted) return;
  kind_ = Kind::kGradients;
  absent_.push_back({message.rank, message.tensors});
  for (Shard& shard : shards_) CheckStaged(&shard, actions);
  MaybeSendStageReport(actions);
}

// The first LOAD must set every weight. If it sets nothing in a shard, it is refused before
// anything is staged.
absl::Status Participant::CheckFirstLoad() const {
  if (committed_step_ != kLoading) return absl::OkStatus();
  for (const Shard& shard : shards_) {
    const bool may_be_unset = spec_->tensors[spec_->shards[shard.id].tensor].may_be_unset;
    if (!shard.pieces.empty() || may_be_unset) continue;
    const ShardName name = NameOf(shard.id);
    return About(name, Because(Reason::kLoading, absl::FailedPreconditionError(absl::StrCat(
                                                     "the first LOAD sets nothing in shard ",
                                                     name.index, " of '", name.tensor, "'"))));
  }
  return absl::OkStatus();
}

ShardName Participant::NameOf(ShardId shard) const {
  const TensorId tensor = spec_->shards[shard].tensor;
  ShardName name{spec_->tensors[tensor].name, 0};
  while (shard > 0 && spec_->shards[shard - 1].tensor == tensor) {
    --shard;
    ++name.index;
  }
  return name;
}

void Participant::Obey(ServerId from, const Seal& message, int64_t now_ms, Actions* actions) {
  if (!opened_ || message.generation != generation_ || message.step != committed_step_ + 1 ||
      message.attempt != attempt_) {
    return;
  }
  SealReply reply{epoch_, message.step, message.attempt, CheckFirstLoad()};
  if (kind_ == Kind::kGradients) {
    reply.status = Unfit("gradients were pushed in an attempt that is a LOAD");
  }
  if (absl::Status failure = AttemptFailure(); !failure.ok()) reply.status = std::move(failure);
  const bool accepted = reply.status.ok() && !sealed_;
  SendToLeader(std::move(reply), actions);
  if (!accepted) return;
  kind_ = Kind::kLoad;
  sealed_ = true;
  for (Shard& shard : shards_) {
    shard.stage = Stage::kOpen;  // a shard without gradients counted as staged
    CheckStaged(&shard, actions);
  }
  MaybeSendStageReport(actions);
}

// Begins to stage a shard once every piece of it has arrived or is absent.
void Participant::CheckStaged(Shard* shard, Actions* actions) {
  if (shard->stage != Stage::kOpen || !opened_ || layout_ == nullptr || prepared_ != nullptr)
    return;
  bool absent = shard->pieces.empty();
  if (kind_ == Kind::kLoad) {
    if (!sealed_) return;
  } else {
    if (committed_step_ == kLoading) return;
    size_t arrived = 0;
    for (const ExpectedPiece& expected : shard->expected) {
      if (IsAbsent(expected.rank, spec_->shards[shard->id].tensor)) continue;
      PieceKey key;
      key.rank = expected.rank;
      key.region = static_cast<uint64_t>(expected.region);
      const auto at = std::lower_bound(shard->pieces.begin(), shard->pieces.end(), key, Before);
      if (at == shard->pieces.end() || Before(StagedPiece{key, {}, -1}, at->key)) return;
      ++arrived;
    }
    absent = arrived == 0;
  }
  shard->staged = {};
  shard->staged.shard = shard->id;
  for (const StagedPiece& piece : shard->pieces) {
    shard->staged.loaded_applied_count =
        std::max(shard->staged.loaded_applied_count, piece.applied_count);
  }
  if (absent) {
    shard->staged.absent = true;
    shard->stage = Stage::kStaged;
    return;
  }
  shard->stage = Stage::kReducing;
  actions->push_back(StageShard{shard->id, committed_step_ + 1, attempt_, kind_ == Kind::kLoad});
}

void Participant::OnShardStaged(int64_t step, int64_t attempt, const ShardStaged& staged,
                                int64_t now_ms, Actions* actions) {
  const int index = LocalIndex(staged.shard);
  if (index < 0 || step != committed_step_ + 1 || attempt != attempt_) return;
  Shard& shard = shards_[index];
  if (shard.stage != Stage::kReducing) return;
  shard.stage = Stage::kStaged;
  shard.staged.digest = staged.digest;
  shard.staged.sum_of_squares = staged.sum_of_squares;
  shard.staged.non_finite_count = staged.non_finite_count;
  stage_report_sent_ms_ = now_ms;
  MaybeSendStageReport(actions);
}

void Participant::OnShardStagingFailed(ShardId id, int64_t step, int64_t attempt,
                                       absl::Status status, int64_t now_ms, Actions* actions) {
  const int index = LocalIndex(id);
  if (index < 0 || step != committed_step_ + 1 || attempt != attempt_) return;
  if (shards_[index].stage != Stage::kReducing || !staging_failure_.ok()) return;
  staging_failure_ = std::move(status);
  SendStagingFailure(now_ms, actions);
}

absl::Status Participant::AttemptFailure() const {
  return damaged_.empty() ? staging_failure_ : damage();
}

void Participant::SendStagingFailure(int64_t now_ms, Actions* actions) {
  if (staging_failure_.ok() || !opened_) return;
  failure_sent_ms_ = now_ms;
  SendToLeader(SealReply{epoch_, committed_step_ + 1, attempt_, staging_failure_}, actions);
}

bool Participant::IsStaged() const {
  // Of a LOAD nothing is staged before the Seal, although a shard that takes no gradients, as a
  // buffer, counts as staged from the start of an attempt.
  if (kind_ == Kind::kLoad && !sealed_) return false;
  return std::all_of(shards_.begin(), shards_.end(),
                     [](const Shard& shard) { return shard.stage == Stage::kStaged; });
}

void Participant::MaybeSendStageReport(Actions* actions) {
  if (!opened_ || layout_ == nullptr || prepared_ != nullptr || !IsStaged()) return;
  if (committed_step_ == kLoading && !sealed_) return;
  StageReport report{
      epoch_, generation_, committed_step_ + 1, attempt_, kind_ == Kind::kLoad, has_scale_,
      scale_, {}};
  for (const Shard& shard : shards_) report.shards.push_back(shard.staged);
  stage_report_due_ = true;
  SendToLeader(std::move(report), actions);
}

void Participant::Obey(ServerId from, const StageReply& message, int64_t now_ms, Actions* actions) {
  if (message.step == committed_step_ + 1 && message.attempt == attempt_ &&
      message.is_load == (kind_ == Kind::kLoad)) {
    stage_report_due_ = false;
  }
}

std::vector<StagedPiece> Participant::PiecesOf(ShardId shard) const {
  const int index = LocalIndex(shard);
  return index < 0 ? std::vector<StagedPiece>{} : shards_[index].pieces;
}

std::vector<Rank> Participant::AbsentOf(ShardId shard) const {
  std::vector<Rank> ranks;
  for (const ParticipantImage::AbsentTensors& entry : absent_) {
    if (IsAbsent(entry.rank, spec_->shards[shard].tensor)) ranks.push_back(entry.rank);
  }
  std::sort(ranks.begin(), ranks.end());
  return ranks;
}

// ---- Pulls -----------------------------------------------------------------------------------

// OK: the version is here (applied_step equals it) or is the next one.
absl::Status Participant::CheckServing(const Shard& shard, int64_t version) const {
  if (life_ != Life::kRunning) return absl::UnavailableError("the server is stopping");
  if (!opened_) return absl::UnavailableError("the job is recovering");
  const std::string& tensor = spec_->tensors[spec_->shards[shard.id].tensor].name;
  if (!IsInSync(shard.id)) {
    return absl::NotFoundError(absl::StrCat("tensor ", tensor, " shard ", shard.id,
                                            ": no in-sync copy on server ", self_));
  }
  // Once the first LOAD is prepared here, workers may know of its commit before this copy does:
  // they wait.
  if (shard.applied_step == kLoading && prepared_ == nullptr) {
    return Unfit("the job is LOADING");
  }
  const int64_t current = shard.applied_step + (committed_ && shard.applied_step < committed_step_);
  if (version < current) {
    return absl::OutOfRangeError(absl::StrCat("tensor ", tensor, " shard ", shard.id, ": version ",
                                              version, " is applied over, current is ", current));
  }
  if (version > current + 1) {
    return Unfit(absl::StrCat("tensor ", tensor, " shard ", shard.id, ": version ", version,
                              " asked, current is ", current));
  }
  return absl::OkStatus();
}

void Participant::OnPull(RequestId request, ShardId id, int64_t version, int64_t now_ms,
                         Actions* actions) {
  const int index = LocalIndex(id);
  if (index < 0) {
    return Reply(
        request,
        absl::NotFoundError(absl::StrCat("shard ", id, " is not placed on server ", self_)),
        actions);
  }
  Shard& shard = shards_[index];
  absl::Status status = CheckServing(shard, version);
  if (!status.ok()) return Reply(request, std::move(status), actions);
  if (shard.applied_step != version) {
    const auto damage = damaged_.find(id);
    if (damage != damaged_.end()) return Reply(request, damage->second, actions);
    shard.pulls.push_back({request, version});
    return;
  }
  shard.pins.push_back({request, now_ms + options_.pin_ms});
  actions->push_back(Serve{request, id, version});
}

void Participant::WakePulls(Shard* shard, int64_t now_ms, Actions* actions) {
  for (WaitingPull& pull : std::exchange(shard->pulls, {})) {
    OnPull(pull.request, shard->id, pull.version, now_ms, actions);
  }
}

void Participant::OnPullDone(RequestId request, int64_t now_ms, Actions* actions) {
  for (Shard& shard : shards_) {
    std::erase_if(shard.pins, [&](const Pin& pin) { return pin.request == request; });
  }
  StartApplies(now_ms, actions);
}

void Participant::OnPullCancelled(RequestId request, int64_t now_ms, Actions* actions) {
  for (Shard& shard : shards_) {
    std::erase_if(shard.pulls, [&](const WaitingPull& pull) { return pull.request == request; });
  }
  OnPullDone(request, now_ms, actions);
}

void Participant::FailWaitingPulls(const absl::Status& status, Actions* actions) {
  for (Shard& shard : shards_) {
    for (const WaitingPull& pull : std::exchange(shard.pulls, {})) {
      Reply(pull.request, status, actions);
    }
  }
}

}  // namespace orlop::step
