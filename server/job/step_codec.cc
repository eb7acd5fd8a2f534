#include "server/job/step_codec.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/box.h"
#include "orlop/v1/peer.pb.h"
#include "proto/convert.h"
#include "proto/status.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/messages.h"
#include "server/step/participant.h"
#include "server/step/reason.h"

namespace orlop::server {
namespace {

using step::Message;

// Of the text of an error from another server, which goes on to workers.
constexpr size_t kMaxStatusBytes = 2048;

// Returns the enumerator, or a value that no enumerator has (step::CheckMessage refuses it).
template <typename Enum>
Enum EnumOf(uint32_t value) {
  return static_cast<Enum>(std::min<uint32_t>(value, UINT8_MAX));
}

void StatusToWire(const absl::Status& status, v1::PeerStatus* out) {
  out->set_code(static_cast<int>(status.code()));
  out->set_message(std::string(status.message()));
  *out->mutable_detail() = DetailOfStep(status);
}

// Returns the code of an error that another server tells. It goes on to workers, so a code that no
// step has becomes Unavailable.
absl::StatusCode CodeOf(const v1::PeerStatus& status) {
  const auto code = static_cast<absl::StatusCode>(status.code());
  switch (code) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kDataLoss:
      return code;
    default:
      return absl::StatusCode::kUnavailable;
  }
}

absl::Status StatusToStep(const v1::PeerStatus& status) {
  if (status.code() == 0) return absl::OkStatus();
  return MakeError(CodeOf(status), Beginning(status.message(), kMaxStatusBytes), status.detail());
}

// ---- short messages: KeyBody has a field for every field that one of them has ----

template <typename M>
void KeyToWire(const M& m, v1::KeyBody* out) {
  out->set_epoch(m.epoch);
  if constexpr (requires { m.generation; }) out->set_generation(m.generation);
  if constexpr (requires { m.committed_step; }) out->set_step(m.committed_step);
  if constexpr (requires { m.step; }) out->set_step(m.step);
  if constexpr (requires { m.attempt; }) out->set_attempt(m.attempt);
  if constexpr (requires { m.decision; }) ToWire(m.decision, out->mutable_decision());
  if constexpr (requires { m.manifest_digest; }) ToWire(m.manifest_digest, out->mutable_decision());
  if constexpr (requires { m.level; }) out->set_level(static_cast<uint32_t>(m.level));
  if constexpr (requires { m.done; }) out->set_done(m.done);
  if constexpr (requires { m.is_load; }) out->set_is_load(m.is_load);
  if constexpr (requires { m.status; }) StatusToWire(m.status, out->mutable_status());
}

template <typename M>
M KeyToStep(const v1::KeyBody& in) {
  M m;
  m.epoch = in.epoch();
  if constexpr (requires { m.generation; }) m.generation = in.generation();
  if constexpr (requires { m.committed_step; }) m.committed_step = in.step();
  if constexpr (requires { m.step; }) m.step = in.step();
  if constexpr (requires { m.attempt; }) m.attempt = in.attempt();
  if constexpr (requires { m.decision; }) m.decision = ToStep(in.decision());
  if constexpr (requires { m.manifest_digest; }) m.manifest_digest = ToStep(in.decision());
  if constexpr (requires { m.level; }) m.level = EnumOf<step::Level>(in.level());
  if constexpr (requires { m.done; }) m.done = in.done();
  if constexpr (requires { m.is_load; }) m.is_load = in.is_load();
  if constexpr (requires { m.status; }) m.status = StatusToStep(in.status());
  return m;
}

// ---- lists ----

void ReportsToWire(const std::vector<step::ShardReport>& reports,
                   google::protobuf::RepeatedPtrField<v1::ShardReportBody>* out) {
  for (const step::ShardReport& report : reports) {
    v1::ShardReportBody* body = out->Add();
    body->set_shard(report.shard);
    body->set_applied_step(report.applied_step);
    ToWire(report.applied, body->mutable_applied());
  }
}

std::vector<step::ShardReport> ReportsToStep(
    const google::protobuf::RepeatedPtrField<v1::ShardReportBody>& in) {
  std::vector<step::ShardReport> reports;
  for (const v1::ShardReportBody& body : in)
    reports.push_back({body.shard(), body.applied_step(), ToStep(body.applied())});
  return reports;
}

void PlacementToWire(const step::Placement& placement, v1::PlacementBody* out) {
  for (const std::vector<step::Copy>& copies : placement) {
    v1::CopiesBody* body = out->add_shards();
    for (const step::Copy& copy : copies) {
      body->add_server(copy.server);
      body->add_incarnation(copy.incarnation);
    }
  }
}

step::Placement PlacementToStep(const v1::PlacementBody& in) {
  step::Placement placement;
  for (const v1::CopiesBody& body : in.shards()) {
    std::vector<step::Copy>& copies = placement.emplace_back();
    for (int i = 0; i < std::min(body.server_size(), body.incarnation_size()); ++i) {
      copies.push_back({static_cast<step::ServerId>(body.server(i)), body.incarnation(i)});
    }
  }
  return placement;
}

// ---- the longer messages ----

void FlushToWire(const step::RecoverReport::Flush& flush, v1::FlushBody* out) {
  out->set_step(flush.step);
  ToWire(flush.decision, out->mutable_decision());
}
step::RecoverReport::Flush FlushToStep(const v1::FlushBody& in) {
  return {in.step(), ToStep(in.decision())};
}

v1::RecoverReportBody ReportToWire(const step::RecoverReport& m) {
  v1::RecoverReportBody out;
  out.set_epoch(m.epoch);
  out.set_incarnation(m.incarnation);
  ReportsToWire(m.shards, out.mutable_shards());
  if (m.last_applied != nullptr) ToWire(*m.last_applied, out.mutable_last_applied());
  if (m.prepared != nullptr) ToWire(*m.prepared, out.mutable_prepared());
  out.set_generation(m.generation);
  out.set_staged_step(m.staged_step);
  out.set_staged_attempt(m.staged_attempt);
  out.set_is_staged(m.is_staged);
  out.set_highest_attempt(m.highest_attempt);
  out.set_highest_attempt_step(m.highest_attempt_step);
  for (const step::RecoverReport::Flush& flush : m.flushes) FlushToWire(flush, out.add_flushes());
  return out;
}

step::RecoverReport ReportToStep(const v1::RecoverReportBody& in) {
  step::RecoverReport m;
  m.epoch = in.epoch();
  m.incarnation = in.incarnation();
  m.shards = ReportsToStep(in.shards());
  if (in.has_last_applied()) m.last_applied = ToStep(in.last_applied());
  if (in.has_prepared()) m.prepared = ToStep(in.prepared());
  m.generation = in.generation();
  m.staged_step = in.staged_step();
  m.staged_attempt = in.staged_attempt();
  m.is_staged = in.is_staged();
  m.highest_attempt = in.highest_attempt();
  m.highest_attempt_step = in.highest_attempt_step();
  for (const v1::FlushBody& flush : in.flushes()) m.flushes.push_back(FlushToStep(flush));
  return m;
}

v1::StageReportBody StageToWire(const step::StageReport& m) {
  v1::StageReportBody out;
  out.set_epoch(m.epoch);
  out.set_generation(m.generation);
  out.set_step(m.step);
  out.set_attempt(m.attempt);
  out.set_is_load(m.is_load);
  out.set_has_scale(m.has_scale);
  out.set_scale(m.scale);
  for (const step::ShardStaged& shard : m.shards) {
    v1::ShardStagedBody* body = out.add_shards();
    body->set_shard(shard.shard);
    ToWire(shard.digest, body->mutable_digest());
    body->set_sum_of_squares(shard.sum_of_squares);
    body->set_non_finite_count(shard.non_finite_count);
    body->set_absent(shard.absent);
    body->set_loaded_applied_count(shard.loaded_applied_count);
  }
  return out;
}

step::StageReport StageToStep(const v1::StageReportBody& in) {
  step::StageReport m;
  m.epoch = in.epoch();
  m.generation = in.generation();
  m.step = in.step();
  m.attempt = in.attempt();
  m.is_load = in.is_load();
  m.has_scale = in.has_scale();
  m.scale = in.scale();
  for (const v1::ShardStagedBody& body : in.shards()) {
    m.shards.push_back({body.shard(), ToStep(body.digest()), body.sum_of_squares(),
                        body.non_finite_count(), body.absent(), body.loaded_applied_count()});
  }
  return m;
}

v1::OpenJobBody OpenToWire(const step::OpenJob& m) {
  v1::OpenJobBody out;
  out.set_epoch(m.epoch);
  out.set_generation(m.generation);
  out.set_committed_step(m.committed_step);
  out.set_attempt(m.attempt);
  ToWire(m.manifest_digest, out.mutable_manifest_digest());
  if (m.layout != nullptr) ToWire(*m.layout, out.mutable_layout());
  if (m.placement != nullptr) PlacementToWire(*m.placement, out.mutable_placement());
  if (!m.kept.decision.empty()) FlushToWire(m.kept, out.mutable_kept());
  return out;
}

step::OpenJob OpenToStep(const v1::OpenJobBody& in) {
  step::OpenJob m;
  m.epoch = in.epoch();
  m.generation = in.generation();
  m.committed_step = in.committed_step();
  m.attempt = in.attempt();
  m.manifest_digest = ToStep(in.manifest_digest());
  if (in.has_layout()) m.layout = ToStep(in.layout());
  m.placement = std::make_shared<step::Placement>(PlacementToStep(in.placement()));
  if (in.has_kept()) m.kept = FlushToStep(in.kept());
  return m;
}

template <typename M>
v1::AbsentBody AbsentToWire(const M& m) {
  v1::AbsentBody out;
  out.set_epoch(m.epoch);
  out.set_step(m.step);
  out.set_attempt(m.attempt);
  out.set_rank(m.rank);
  if constexpr (requires { m.generation; }) out.set_generation(m.generation);
  if constexpr (requires { m.tensors; })
    out.mutable_tensors()->Assign(m.tensors.begin(), m.tensors.end());
  if constexpr (requires { m.status; }) StatusToWire(m.status, out.mutable_status());
  return out;
}

template <typename M>
M AbsentToStep(const v1::AbsentBody& in) {
  M m;
  m.epoch = in.epoch();
  m.step = in.step();
  m.attempt = in.attempt();
  m.rank = in.rank();
  if constexpr (requires { m.generation; }) m.generation = in.generation();
  if constexpr (requires { m.tensors; }) m.tensors.assign(in.tensors().begin(), in.tensors().end());
  if constexpr (requires { m.status; }) m.status = StatusToStep(in.status());
  return m;
}

// Fills the body of a StepMessage. Returns false for a message that has no form on the wire.
struct BodyWriter {
  v1::StepMessage* out;

  bool operator()(const step::Register& m) {
    out->mutable_register_()->set_incarnation(m.incarnation);
    out->mutable_register_()->set_epoch(m.epoch);
    return true;
  }
  bool operator()(const step::RecoverReport& m) {
    return *out->mutable_recover_report() = ReportToWire(m), true;
  }
  bool operator()(const step::StageReport& m) {
    return *out->mutable_stage_report() = StageToWire(m), true;
  }
  bool operator()(const step::OpenJob& m) { return *out->mutable_open_job() = OpenToWire(m), true; }
  bool operator()(const step::Absent& m) { return *out->mutable_absent() = AbsentToWire(m), true; }
  bool operator()(const step::AbsentReply& m) {
    return *out->mutable_absent_reply() = AbsentToWire(m), true;
  }
  bool operator()(const step::Prepare& m) {
    out->mutable_prepare()->set_epoch(m.epoch);
    ToWire(*m.decision, out->mutable_prepare()->mutable_decision());
    return true;
  }
  bool operator()(const step::Recover& m) { return KeyToWire(m, out->mutable_recover()), true; }
  bool operator()(const step::Restore& m) { return KeyToWire(m, out->mutable_restore()), true; }
  bool operator()(const step::RestoreReply& m) {
    return KeyToWire(m, out->mutable_restore_reply()), true;
  }
  bool operator()(const step::OpenReply& m) {
    return KeyToWire(m, out->mutable_open_reply()), true;
  }
  bool operator()(const step::Flush& m) {
    v1::FlushStepBody* body = out->mutable_flush();
    body->set_epoch(m.epoch);
    body->set_step(m.step);
    ToWire(m.decision, body->mutable_decision());
    if (!m.kept.decision.empty()) FlushToWire(m.kept, body->mutable_kept());
    return true;
  }
  bool operator()(const step::FlushReply& m) {
    return KeyToWire(m, out->mutable_flush_reply()), true;
  }
  bool operator()(const step::Seal& m) { return KeyToWire(m, out->mutable_seal()), true; }
  bool operator()(const step::SealReply& m) {
    return KeyToWire(m, out->mutable_seal_reply()), true;
  }
  bool operator()(const step::StageReply& m) {
    return KeyToWire(m, out->mutable_stage_reply()), true;
  }
  bool operator()(const step::Prepared& m) { return KeyToWire(m, out->mutable_prepared()), true; }
  bool operator()(const step::Apply& m) { return KeyToWire(m, out->mutable_apply()), true; }
  bool operator()(const step::Applied& m) { return KeyToWire(m, out->mutable_applied()), true; }
  bool operator()(const step::Discard& m) { return KeyToWire(m, out->mutable_discard()), true; }
  bool operator()(const step::Discarded& m) { return KeyToWire(m, out->mutable_discarded()), true; }
  bool operator()(const step::Fenced& m) { return KeyToWire(m, out->mutable_fenced()), true; }
  template <typename Other>
  bool operator()(const Other&) {
    return false;
  }
};

}  // namespace

v1::ErrorDetail DetailOfStep(const absl::Status& status) {
  static_assert(static_cast<int>(step::Reason::kLoading) == v1::ErrorDetail::LOADING);
  static_assert(static_cast<int>(step::Reason::kStopping) == v1::ErrorDetail::STOPPING);
  static_assert(v1::ErrorDetail::Reason_MAX == v1::ErrorDetail::UNSET);  // none of a machine
  v1::ErrorDetail detail = DetailOf(status);
  if (detail.reason() == v1::ErrorDetail::REASON_UNSPECIFIED) {
    detail.set_reason(static_cast<v1::ErrorDetail::Reason>(step::ReasonOf(status)));
  }
  if (const std::optional<step::ShardName> shard = step::ShardOf(status); shard.has_value()) {
    detail.set_tensor(shard->tensor);
    detail.set_shard(shard->index);
  }
  return detail;
}

void ToWire(const step::DecisionRecord& d, v1::DecisionBody* out) {
  out->set_epoch(d.epoch);
  out->set_generation(d.generation);
  out->set_step(d.step);
  out->set_attempt(d.attempt);
  out->set_kind(static_cast<uint32_t>(d.kind));
  out->set_arithmetic_version(d.arithmetic_version);
  ToWire(d.previous, out->mutable_previous());
  ToWire(d.staged, out->mutable_staged());
  out->set_scale(d.scale);
  out->set_sum_of_squares(d.sum_of_squares);
  out->set_non_finite_count(d.non_finite_count);
  out->set_scalars(d.scalars);
  out->mutable_applied_count()->Assign(d.applied_count.begin(), d.applied_count.end());
  out->set_untouched(std::string(d.untouched.begin(), d.untouched.end()));
  ToWire(d.identity, out->mutable_identity());
}

step::DecisionPtr ToStep(const v1::DecisionBody& in) {
  auto d = std::make_shared<step::DecisionRecord>();
  d->epoch = in.epoch();
  d->generation = in.generation();
  d->step = in.step();
  d->attempt = in.attempt();
  d->kind = EnumOf<step::DecisionKind>(in.kind());
  d->arithmetic_version = in.arithmetic_version();
  d->previous = ToStep(in.previous());
  d->staged = ToStep(in.staged());
  d->scale = in.scale();
  d->sum_of_squares = in.sum_of_squares();
  d->non_finite_count = in.non_finite_count();
  d->scalars = in.scalars();
  d->applied_count.assign(in.applied_count().begin(), in.applied_count().end());
  d->untouched.assign(in.untouched().begin(), in.untouched().end());
  d->identity = ToStep(in.identity());
  return d;
}

void ToWire(const step::Layout& layout, v1::LayoutBody* out) {
  for (const std::vector<step::Contribution>& rank : layout.by_rank) {
    v1::ContributionsBody* contributions = out->add_ranks();
    for (const step::Contribution& contribution : rank) {
      v1::ContributionBody* body = contributions->add_tensors();
      body->set_tensor(contribution.tensor);
      body->set_mode(static_cast<uint32_t>(contribution.mode));
      for (const Box& box : contribution.boxes) {
        v1::StepBox* wire = body->add_boxes();
        wire->mutable_offset()->Assign(box.offset.begin(), box.offset.end());
        wire->mutable_extent()->Assign(box.extent.begin(), box.extent.end());
      }
    }
  }
}

std::shared_ptr<const step::Layout> ToStep(const v1::LayoutBody& in) {
  auto layout = std::make_shared<step::Layout>();
  for (const v1::ContributionsBody& rank : in.ranks()) {
    std::vector<step::Contribution>& contributions = layout->by_rank.emplace_back();
    for (const v1::ContributionBody& body : rank.tensors()) {
      step::Contribution& contribution = contributions.emplace_back();
      contribution.tensor = body.tensor();
      contribution.mode = EnumOf<step::Mode>(body.mode());
      for (const v1::StepBox& box : body.boxes()) {
        contribution.boxes.push_back({{box.offset().begin(), box.offset().end()},
                                      {box.extent().begin(), box.extent().end()},
                                      box.offset_size() == 1});
      }
    }
  }
  layout->digest = step::DigestLayout(layout->by_rank);
  return layout;
}

absl::StatusOr<v1::StepMessage> ToWire(const Message& message) {
  v1::StepMessage out;
  if (!std::visit(BodyWriter{&out}, message)) {
    return absl::UnimplementedError(
        "jobs of several copies do not exist yet: CatchUp and Forward have no wire form");
  }
  return out;
}

absl::StatusOr<Message> ToStep(const v1::StepMessage& in) {
  using S = v1::StepMessage;
  switch (in.body_case()) {
    case S::kRegister:
      return Message(step::Register{in.register_().incarnation(), in.register_().epoch()});
    case S::kRecoverReport:
      return Message(ReportToStep(in.recover_report()));
    case S::kStageReport:
      return Message(StageToStep(in.stage_report()));
    case S::kRecover:
      return Message(KeyToStep<step::Recover>(in.recover()));
    case S::kRestore:
      return Message(KeyToStep<step::Restore>(in.restore()));
    case S::kRestoreReply:
      return Message(KeyToStep<step::RestoreReply>(in.restore_reply()));
    case S::kOpenJob:
      return Message(OpenToStep(in.open_job()));
    case S::kOpenReply:
      return Message(KeyToStep<step::OpenReply>(in.open_reply()));
    case S::kFlush:
      return Message(step::Flush{
          in.flush().epoch(), in.flush().step(), ToStep(in.flush().decision()),
          in.flush().has_kept() ? FlushToStep(in.flush().kept()) : step::RecoverReport::Flush()});
    case S::kFlushReply:
      return Message(KeyToStep<step::FlushReply>(in.flush_reply()));
    case S::kAbsent:
      return Message(AbsentToStep<step::Absent>(in.absent()));
    case S::kAbsentReply:
      return Message(AbsentToStep<step::AbsentReply>(in.absent_reply()));
    case S::kSeal:
      return Message(KeyToStep<step::Seal>(in.seal()));
    case S::kSealReply:
      return Message(KeyToStep<step::SealReply>(in.seal_reply()));
    case S::kStageReply:
      return Message(KeyToStep<step::StageReply>(in.stage_reply()));
    case S::kPrepare:
      return Message(step::Prepare{in.prepare().epoch(), ToStep(in.prepare().decision())});
    case S::kPrepared:
      return Message(KeyToStep<step::Prepared>(in.prepared()));
    case S::kApply:
      return Message(KeyToStep<step::Apply>(in.apply()));
    case S::kApplied:
      return Message(KeyToStep<step::Applied>(in.applied()));
    case S::kDiscard:
      return Message(KeyToStep<step::Discard>(in.discard()));
    case S::kDiscarded:
      return Message(KeyToStep<step::Discarded>(in.discarded()));
    case S::kFenced:
      return Message(KeyToStep<step::Fenced>(in.fenced()));
    case S::BODY_NOT_SET:
      break;
  }
  return MakeError(absl::StatusCode::kInvalidArgument, "a StepMessage without a body",
                   v1::ErrorDetail::BAD_REQUEST);
}

std::string Serialize(const step::JobRecord& record) {
  v1::JobRecordBody out;
  out.set_version(record.version);
  out.set_epoch(record.epoch);
  out.set_opened(record.opened);
  out.set_generation(record.generation);
  out.set_formed(record.formed);
  if (record.layout != nullptr) ToWire(*record.layout, out.mutable_layout());
  PlacementToWire(record.in_sync, out.mutable_in_sync());
  out.set_rolling_back(record.rolling_back);
  out.set_rollback_step(record.rollback_step);
  ToWire(record.rollback_digest, out.mutable_rollback_digest());
  out.set_accepted_at(record.accepted_at);
  out.set_accepted_loss(record.accepted_loss);
  return out.SerializeAsString();
}

absl::StatusOr<step::JobRecord> ParseJobRecord(const std::string& bytes) {
  v1::JobRecordBody in;
  if (!in.ParseFromString(bytes))
    return absl::DataLossError("the stored record of the job is damaged");
  step::JobRecord record;
  record.version = in.version();
  record.epoch = in.epoch();
  record.opened = in.opened();
  record.generation = in.generation();
  record.formed = in.formed();
  if (in.has_layout()) record.layout = ToStep(in.layout());
  record.in_sync = PlacementToStep(in.in_sync());
  record.rolling_back = in.rolling_back();
  record.rollback_step = in.rollback_step();
  record.rollback_digest = ToStep(in.rollback_digest());
  record.accepted_at = in.accepted_at();
  record.accepted_loss = in.accepted_loss();
  return record;
}

std::string Serialize(const step::ParticipantImage& image, const step::Layout* layout) {
  v1::ImageBody out;
  out.set_epoch(image.epoch);
  out.set_incarnation(image.incarnation);
  ReportsToWire(image.shards, out.mutable_shards());
  if (image.last_applied != nullptr) ToWire(*image.last_applied, out.mutable_last_applied());
  if (image.prepared != nullptr) ToWire(*image.prepared, out.mutable_prepared());
  out.set_discarded_step(image.discarded_step);
  out.set_discarded_attempt(image.discarded_attempt);
  out.set_generation(image.generation);
  out.set_attempt(image.attempt);
  out.set_is_load(image.is_load);
  out.set_has_scale(image.has_scale);
  out.set_scale(image.scale);
  for (const step::StagedPiece& piece : image.pieces) {
    v1::ImageBody::Piece* body = out.add_pieces();
    body->set_generation(piece.key.generation);
    body->set_step(piece.key.step);
    body->set_attempt(piece.key.attempt);
    body->set_shard(piece.key.shard);
    body->set_rank(piece.key.rank);
    body->set_region(piece.key.region);
    ToWire(piece.payload, body->mutable_payload());
    body->set_applied_count(piece.applied_count);
  }
  for (const auto& absent : image.absent) {
    v1::ImageBody::AbsentTensors* body = out.add_absent();
    body->set_rank(absent.rank);
    body->mutable_tensors()->Assign(absent.tensors.begin(), absent.tensors.end());
  }
  if (layout != nullptr) ToWire(*layout, out.mutable_layout());
  return out.SerializeAsString();
}

absl::StatusOr<StoredImage> ParseImage(const std::string& bytes) {
  v1::ImageBody in;
  if (!in.ParseFromString(bytes))
    return absl::DataLossError("the stored image of the step machine is damaged");
  StoredImage stored;
  step::ParticipantImage& image = stored.image;
  image.epoch = in.epoch();
  image.incarnation = in.incarnation();
  image.shards = ReportsToStep(in.shards());
  if (in.has_last_applied()) image.last_applied = ToStep(in.last_applied());
  if (in.has_prepared()) image.prepared = ToStep(in.prepared());
  image.discarded_step = in.discarded_step();
  image.discarded_attempt = in.discarded_attempt();
  image.generation = in.generation();
  image.attempt = in.attempt();
  image.is_load = in.is_load();
  image.has_scale = in.has_scale();
  image.scale = in.scale();
  for (const v1::ImageBody::Piece& body : in.pieces()) {
    image.pieces.push_back(
        {{body.generation(), body.step(), body.attempt(), body.shard(), body.rank(), body.region()},
         ToStep(body.payload()),
         body.applied_count()});
  }
  for (const auto& body : in.absent()) {
    image.absent.push_back({body.rank(), {body.tensors().begin(), body.tensors().end()}});
  }
  if (in.has_layout()) {
    stored.layout = ToStep(in.layout());
    image.layout = stored.layout->digest;
  }
  return stored;
}

}  // namespace orlop::server
