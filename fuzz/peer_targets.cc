// Targets of what other servers send, and of the same forms on disk.
#include <google/protobuf/message.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "fuzz/model.h"
#include "fuzz/mutators.h"
#include "fuzz/target.h"
#include "kernels/optimizer.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/convert.h"
#include "server/job/contributions.h"
#include "server/job/definition.h"
#include "server/job/job_model.h"
#include "server/job/manifest.h"
#include "server/job/slots.h"
#include "server/job/step_codec.h"
#include "server/runtime/step_scalars.h"
#include "server/step/actions.h"
#include "server/step/check.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/messages.h"
#include "server/step/participant.h"

namespace orlop::fuzz {
namespace {

constexpr int kSelf = 0;
constexpr int64_t kEpoch = 7;

const step::JobSpec& Spec() { return *Model().spec(); }

// Most changed decisions get their right identity again, so that the checks behind it are reached.
void RepairDecision(v1::DecisionBody* decision, uint32_t seed) {
  if (seed % 8 == 0) return;
  const size_t count = Model().tensors().size();
  decision->set_untouched(std::string(count, static_cast<char>(seed % 2)));
  decision->mutable_applied_count()->Resize(static_cast<int>(count), 1);
  Identify(decision);
}

// A target of messages of one type.
Target MessageTarget(const google::protobuf::Message& prototype, std::function<void(Bytes)> run,
                     std::function<void(google::protobuf::Message*, uint32_t)> repair,
                     std::vector<std::string> seeds) {
  MessageHints hints{Words(), std::move(repair)};
  return {std::move(run),
          [&prototype, hints](Bytes input, size_t max_size, uint32_t seed) {
            return MutateMessage(prototype, hints, AsText(input), max_size, seed);
          },
          std::move(seeds)};
}

step::Layout HalfLayout() {
  step::Layout layout;
  layout.by_rank = {
      {{0, step::Mode::kExactlyOnce, {{{0, 0}, {4, 100}}}},
       {1, step::Mode::kExactlyOnce, {{{0}, {100}, true}}}},
      {{0, step::Mode::kExactlyOnce, {{{4, 0}, {4, 100}}}}, {1, step::Mode::kNone, {}}}};
  layout.digest = step::DigestLayout(layout.by_rank);
  return layout;
}

step::Placement WholePlacement() {
  return {{{0, 1}}, {{0, 1}}, {{1, 2}}, {{1, 2}}, {{1, 2}}, {{0, 1}}, {{0, 1}}};
}

// ---- Messages of the step machines -------------------------------------------------------------

// What passes the check keeps its form on the wire, and a participant and a leader can take it.
void RunStepMessage(Bytes input) {
  v1::StepMessage wire;
  if (!wire.ParseFromArray(input.data(), static_cast<int>(input.size()))) return;
  const absl::StatusOr<step::Message> message = server::ToStep(wire);
  if (!message.ok()) return;
  const auto from = static_cast<step::ServerId>(wire.from());
  if (!step::CheckMessage(Spec(), kSelf, from, kEpoch, *message).ok()) return;
  const absl::StatusOr<v1::StepMessage> again = server::ToWire(*message);
  Require(again.ok(), "a message that was received can be sent");
  const absl::StatusOr<step::Message> twice = server::ToStep(*again);
  Require(twice.ok() && server::ToWire(*twice)->SerializeAsString() == again->SerializeAsString(),
          "a message keeps its form");
  Require(step::CheckMessage(Spec(), kSelf, from, kEpoch, *twice).ok(), "and its check");
}

void RepairStepMessage(google::protobuf::Message* message, uint32_t seed) {
  auto* wire = static_cast<v1::StepMessage*>(message);
  if (seed % 7 != 0) wire->set_from(1);
  if (wire->has_prepare()) RepairDecision(wire->mutable_prepare()->mutable_decision(), seed);
  if (!wire->has_recover_report()) return;
  v1::RecoverReportBody* report = wire->mutable_recover_report();
  if (report->has_last_applied()) RepairDecision(report->mutable_last_applied(), seed);
  if (report->has_prepared()) RepairDecision(report->mutable_prepared(), seed);
}

std::vector<step::Message> Messages() {
  const auto decision =
      std::make_shared<step::DecisionRecord>(Decision(3, step::DecisionKind::kApply));
  const step::Digest digest = decision->identity;
  const absl::Status fault = absl::DataLossError("damaged");
  step::RecoverReport report;
  report.epoch = kEpoch;
  report.shards = {{2, 3, digest}, {3, 3, digest}};
  report.last_applied = report.prepared = decision;
  report.flushes = {{2, digest}};
  step::StageReport staged;
  staged.epoch = kEpoch;
  staged.shards = {{2, digest, 1.0, 0, false, -1}, {4, digest, 1.0, 0, true, 2}};
  step::OpenJob open;
  open.epoch = kEpoch;
  open.layout = std::make_shared<step::Layout>(HalfLayout());
  open.placement = std::make_shared<step::Placement>(WholePlacement());
  open.kept = {2, digest};
  return {step::Register{1, kEpoch},
          report,
          staged,
          step::Recover{kEpoch, digest},
          step::Restore{kEpoch, 2, digest},
          step::RestoreReply{kEpoch, 2, digest, fault},
          open,
          step::OpenReply{kEpoch, 1, 3, 1, absl::OkStatus()},
          step::Flush{kEpoch, 3, digest, {2, digest}},
          step::FlushReply{kEpoch, 3, digest, fault},
          step::Absent{kEpoch, 1, 4, 1, 0, {0, 1}},
          step::AbsentReply{kEpoch, 4, 1, 0, fault},
          step::Seal{kEpoch, 1, 4, 1},
          step::SealReply{kEpoch, 4, 1, fault},
          step::StageReply{kEpoch, 4, 1, true},
          step::Prepare{kEpoch, decision},
          step::Prepared{kEpoch, 3, digest, step::Level::kJournaled, fault},
          step::Apply{kEpoch, 3, digest},
          step::Applied{kEpoch, 3, digest, true, fault},
          step::Discard{kEpoch, 3, 1},
          step::Discarded{kEpoch, 3, 1},
          step::Fenced{kEpoch}};
}

std::string MoreFlushesThanMayBe() {
  v1::StepMessage wire;
  wire.set_from(1);
  wire.mutable_recover_report()->set_epoch(kEpoch);
  for (int i = 0; i < 1025; ++i) wire.mutable_recover_report()->add_flushes();
  return wire.SerializeAsString();
}

std::vector<std::string> StepMessageSeeds() {
  std::vector<std::string> seeds;
  for (const step::Message& message : Messages()) {
    v1::StepMessage wire = server::ToWire(message).value();
    wire.set_job("job");
    wire.set_from(1);
    seeds.push_back(wire.SerializeAsString());
  }
  seeds.push_back(MoreFlushesThanMayBe());
  // Forward and its like have no form on the wire.
  Require(!server::ToWire(step::Forward()).ok(), "a message of copies has no form");
  return seeds;
}

// ---- Records on disk ---------------------------------------------------------------------------

void RunRecord(Bytes input) {
  const absl::StatusOr<step::JobRecord> record = server::ParseJobRecord(std::string(AsText(input)));
  if (!record.ok()) return;
  const std::string bytes = server::Serialize(*record);
  Require(server::Serialize(server::ParseJobRecord(bytes).value()) == bytes,
          "a record keeps its form");
  (void)step::CheckRecord(Spec(), *record);
}

// What a server reports that begins with a checked image passes the check of the other servers.
void CheckReport(step::ParticipantImage image) {
  image.has_memory = true;
  image.incarnation = 1;
  const int64_t epoch = image.epoch + 1;
  if (epoch > step::kMaxCounter) return;
  for (const step::ShardReport& shard : image.shards)
    if (shard.applied_step == step::kMaxCounter) return;  // the last step of all has no next one
  step::Participant participant(Model().spec(), kSelf, 1, image, 1, {});
  step::Actions actions;
  participant.OnMessage(1, step::Recover{epoch, Spec().manifest_digest}, 0, &actions);
  participant.OnEpochDurable(epoch, 0, &actions);
  for (const step::Action& action : actions)
    if (const auto* sent = std::get_if<step::Send>(&action))
      Require(step::CheckMessage(Spec(), 1, kSelf, epoch, sent->message).ok(),
              "a report passes its check");
}

void RunImage(Bytes input) {
  const absl::StatusOr<server::StoredImage> stored = server::ParseImage(std::string(AsText(input)));
  if (!stored.ok()) return;
  const std::string bytes = server::Serialize(stored->image, stored->layout.get());
  const absl::StatusOr<server::StoredImage> again = server::ParseImage(bytes);
  Require(again.ok() && server::Serialize(again->image, again->layout.get()) == bytes,
          "an image keeps its form");
  if (!step::CheckImage(Spec(), kSelf, stored->image).ok()) return;
  CheckReport(stored->image);
  if (stored->layout == nullptr || !step::CheckBoxes(Spec(), *stored->layout).ok()) return;
  server::PiecesFor(Model(), Model().LayoutFor(kSelf), *stored->layout);
}

std::vector<std::string> RecordSeeds() {
  step::JobRecord record;
  record.version = 2;
  record.epoch = kEpoch;
  record.opened = true;
  record.generation = record.formed = 1;
  record.in_sync = WholePlacement();
  std::vector<std::string> seeds = {server::Serialize(record)};
  record.layout = std::make_shared<step::Layout>(HalfLayout());
  record.rolling_back = true;
  record.rollback_step = 2;
  record.rollback_digest = {1, 2};
  seeds.push_back(server::Serialize(record));
  return seeds;
}

std::vector<std::string> ImageSeeds() {
  const auto decision =
      std::make_shared<step::DecisionRecord>(Decision(3, step::DecisionKind::kLoad));
  const step::Layout layout = HalfLayout();
  step::ParticipantImage image;
  image.epoch = kEpoch;
  image.incarnation = 1;
  image.shards = {{0, 3, decision->identity}, {1, 3, decision->identity}};
  image.last_applied = image.prepared = decision;
  image.generation = image.attempt = 1;
  image.has_scale = true;
  image.pieces = {{{1, 4, 1, 0, 0, 0}, {5, 6}, -1}, {{1, 4, 1, 1, 1, 0}, {7, 8}, 3}};
  image.absent = {{1, {0, 1}}};
  return {server::Serialize(image, &layout), server::Serialize(image, nullptr),
          server::Serialize(step::ParticipantImage(), nullptr)};
}

void RepairImage(google::protobuf::Message* message, uint32_t seed) {
  auto* image = static_cast<v1::ImageBody*>(message);
  if (image->has_last_applied()) RepairDecision(image->mutable_last_applied(), seed);
  if (image->has_prepared()) RepairDecision(image->mutable_prepared(), seed);
}

// ---- Definitions -------------------------------------------------------------------------------

// What passes the check has a model that answers for every tensor and shard.
void RunDefinition(Bytes input) {
  v1::JobDefinition definition;
  if (!definition.ParseFromArray(input.data(), static_cast<int>(input.size()))) return;
  const auto checked = server::CheckDefinition(definition);
  if (!checked.ok()) return;
  const server::JobModel& model = **checked;
  const std::vector<server::TensorOptimizer> optimizers = model.Optimizers();
  for (uint32_t t = 0; t < model.tensors().size(); ++t) {
    Require(model.FindTensor(model.tensors()[t].name).value() == t, "a tensor has its name");
    model.LiesWhole(t);
    model.GroupOf(t);
    model.Trains(t);
    const int32_t first = model.FirstShard(t);
    model.ReasonOf(first);
    Require(model.Owner(first) < static_cast<int>(definition.server_count()), "a shard is placed");
    for (size_t i = 0; i < server::kStoredSlotCount; ++i)
      (void)server::FormatOf(model.tensors()[t], optimizers[t], static_cast<server::Slot>(i),
                             model.spec()->shards[first].range);
  }
  (void)model.FindTensor("none");
  size_t owned = 0;
  for (const int server : {0, 1}) owned += model.LayoutFor(server).shards.size();
  Require(owned <= model.spec()->shards.size(), "a shard has one owner");
}

void RepairDefinition(google::protobuf::Message* message, uint32_t seed) {
  auto* definition = static_cast<v1::JobDefinition*>(message);
  if (seed % 9 == 0) return;
  if (seed % 64 != 0) {  // a million shards take much time and say nothing new
    v1::CreateJobRequest* manifest = definition->mutable_manifest();
    for (v1::TensorSpec& tensor : *manifest->mutable_tensors())
      for (uint64_t& dimension : *tensor.mutable_shape()) dimension %= 33;
    if (manifest->shard_elements() % 256 != 0) manifest->set_shard_elements(256);
  }
  ToWire(server::ManifestDigest(definition->manifest()), definition->mutable_manifest_digest());
}

std::vector<std::string> DefinitionSeeds() {
  std::vector<std::string> seeds = {Definition().SerializeAsString()};
  v1::JobDefinition changed = Definition();
  changed.mutable_optimizer()->mutable_groups(0)->set_optimizer("muon");
  seeds.push_back(changed.SerializeAsString());
  changed.clear_optimizer();
  changed.clear_runs();
  seeds.push_back(changed.SerializeAsString());
  // More shards than a job may have, and two runs of one shard.
  changed = Definition();
  changed.mutable_manifest()->mutable_tensors(0)->add_shape(uint64_t{1} << 30);
  ToWire(server::ManifestDigest(changed.manifest()), changed.mutable_manifest_digest());
  seeds.push_back(changed.SerializeAsString());
  changed = Definition();
  *changed.add_runs() = changed.runs(0);
  seeds.push_back(changed.SerializeAsString());
  // A manifest that is not complete has the digest of the complete one.
  changed = Definition();
  v1::CreateJobRequest* manifest = changed.mutable_manifest();
  manifest->set_shard_elements(0);
  v1::CreateJobRequest complete = *manifest;
  Require(server::CompleteManifest(&complete).ok(), "the manifest is complete");
  ToWire(server::ManifestDigest(complete), changed.mutable_manifest_digest());
  seeds.push_back(changed.SerializeAsString());
  return seeds;
}

// ---- Scalars of a decision ---------------------------------------------------------------------

void RunScalars(Bytes input) {
  for (const auto kind :
       {step::DecisionKind::kApply, step::DecisionKind::kSkip, step::DecisionKind::kLoad}) {
    if (kind != step::DecisionKind::kApply && !input.empty()) continue;  // they read no scalars
    step::DecisionRecord decision = Decision(3, kind);
    decision.scalars = std::string(AsText(input));
    const auto scalars = server::DecisionScalars::Parse(Model(), decision);
    if (scalars.ok())
      for (uint32_t t = 0; t < Model().tensors().size(); ++t) (void)scalars->UpdateFor(t);
    v1::CommitStepResponse response;
    server::FillCommitted(decision, &response);
  }
}

std::vector<std::string> ScalarsSeeds() {
  v1::StepScalars scalars;
  scalars.set_gradient_norm(1);
  scalars.set_clip_factor(1);
  for (const uint32_t group : {0, 1}) {
    v1::StepScalars::Set* set = scalars.add_sets();
    for (uint32_t t = 0; t < Model().tensors().size(); ++t)
      if (Model().GroupOf(t) == static_cast<int>(group)) set->add_tensors(t);
    const char* const name = group == 0 ? "adamw" : "lion";
    for (size_t i = 0; i < kernels::FindOptimizer(name)->scalar_count; ++i) set->add_bits(1);
  }
  return {scalars.SerializeAsString(), ""};
}

}  // namespace

Target StepMessageTarget() {
  return MessageTarget(v1::StepMessage::default_instance(), RunStepMessage, RepairStepMessage,
                       StepMessageSeeds());
}
Target RecordTarget() {
  return MessageTarget(v1::JobRecordBody::default_instance(), RunRecord, nullptr, RecordSeeds());
}
Target ImageTarget() {
  return MessageTarget(v1::ImageBody::default_instance(), RunImage, RepairImage, ImageSeeds());
}
Target DefinitionTarget() {
  return MessageTarget(v1::JobDefinition::default_instance(), RunDefinition, RepairDefinition,
                       DefinitionSeeds());
}
Target ScalarsTarget() {
  return MessageTarget(v1::StepScalars::default_instance(), RunScalars, nullptr, ScalarsSeeds());
}

}  // namespace orlop::fuzz
