#include "server/step/check.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "base/checksum.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/messages.h"
#include "server/step/participant.h"

namespace orlop::step {
namespace {

constexpr int64_t kMaxLoadedCount = int64_t{1} << 53;  // updates that a LOAD may say it has seen
constexpr size_t kMaxFlushes = 1024;                   // that a server may report

absl::Status Off(std::string_view field, int64_t value, int64_t least, int64_t most) {
  return absl::InvalidArgumentError(absl::StrCat(absl::string_view(field.data(), field.size()), " ",
                                                 value, " is not from ", least, " to ", most));
}

absl::Status CheckRange(std::string_view field, int64_t value, int64_t least, int64_t most) {
  return value >= least && value <= most ? absl::OkStatus() : Off(field, value, least, most);
}

absl::Status CheckCount(std::string_view field, size_t count, size_t wanted) {
  if (count == wanted) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(absl::string_view(field.data(), field.size()),
                                                 " has ", count, " entries instead of ", wanted));
}

absl::Status CheckStep(std::string_view field, int64_t step) {
  return CheckRange(field, step, kLoading, kMaxCounter);
}

// The first error of several checks.
absl::Status First(std::initializer_list<absl::Status> checks) {
  for (const absl::Status& status : checks) {
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

bool MayHold(const JobSpec& spec, ShardId shard, ServerId server) {
  const std::vector<ServerId>& copies = spec.shards[shard].copies;
  return std::find(copies.begin(), copies.end(), server) != copies.end();
}

// Checks one entry of a list of shards of `server` that ascends.
absl::Status CheckShard(const JobSpec& spec, ServerId server, ShardId shard, ShardId* last) {
  const auto count = static_cast<int64_t>(spec.shards.size());
  if (absl::Status known = CheckRange("shard", shard, 0, count - 1); !known.ok()) return known;
  if (shard <= *last)
    return absl::InvalidArgumentError(absl::StrCat("shard ", shard, " follows shard ", *last));
  *last = shard;
  if (MayHold(spec, shard, server)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("shard ", shard, " is not placed on server ", server));
}

absl::Status CheckReports(const JobSpec& spec, ServerId server,
                          const std::vector<ShardReport>& shards) {
  ShardId last = -1;
  for (const ShardReport& shard : shards) {
    const absl::Status status = First({CheckShard(spec, server, shard.shard, &last),
                                       CheckStep("applied_step", shard.applied_step)});
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status CheckOptional(const JobSpec& spec, const DecisionPtr& decision) {
  return decision == nullptr ? absl::OkStatus() : CheckDecision(spec, *decision);
}

absl::Status CheckPlacement(const JobSpec& spec, const Placement& placement) {
  absl::Status status = CheckCount("placement", placement.size(), spec.shards.size());
  for (size_t shard = 0; shard < placement.size() && status.ok(); ++shard) {
    for (const Copy& copy : placement[shard]) {
      if (MayHold(spec, static_cast<ShardId>(shard), copy.server)) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("placement: shard ", shard, " is not placed on server ", copy.server));
    }
  }
  return status;
}

// Every shard of a job that serves has an in-sync copy.
absl::Status CheckWholePlacement(const JobSpec& spec, const Placement& placement) {
  if (absl::Status status = CheckPlacement(spec, placement); !status.ok()) return status;
  const auto empty = std::find_if(placement.begin(), placement.end(),
                                  [](const std::vector<Copy>& copies) { return copies.empty(); });
  if (empty == placement.end()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("placement: shard ", empty - placement.begin(), " has no copy"));
}

absl::Status CheckTensors(const JobSpec& spec, const std::vector<TensorId>& tensors) {
  TensorId last = -1;
  for (const TensorId tensor : tensors) {
    const auto count = static_cast<int64_t>(spec.tensors.size());
    if (absl::Status status = CheckRange("tensor", tensor, last + 1, count - 1); !status.ok())
      return status;
    last = tensor;
  }
  return absl::OkStatus();
}

// What only some kinds of messages have. Each overload checks the lists and decisions of one kind.
struct BodyCheck {
  const JobSpec& spec;
  ServerId from;

  absl::Status operator()(const RecoverReport& m) const {
    absl::Status status =
        First({CheckReports(spec, from, m.shards), CheckOptional(spec, m.last_applied),
               CheckOptional(spec, m.prepared), CheckStep("staged_step", m.staged_step),
               CheckRange("staged_attempt", m.staged_attempt, 0, kMaxCounter),
               CheckRange("highest_attempt", m.highest_attempt, 0, kMaxCounter),
               CheckStep("highest_attempt_step", m.highest_attempt_step)});
    if (status.ok() && m.flushes.size() > kMaxFlushes)
      status = Off("number of flushes", static_cast<int64_t>(m.flushes.size()), 0, kMaxFlushes);
    for (const RecoverReport::Flush& flush : m.flushes) {
      if (status.ok()) status = CheckStep("step of a flush", flush.step);
    }
    return status;
  }
  absl::Status operator()(const StageReport& m) const {
    ShardId last = -1;
    for (const ShardStaged& shard : m.shards) {
      const absl::Status status =
          First({CheckShard(spec, from, shard.shard, &last),
                 CheckRange("applied_count", shard.loaded_applied_count, -1, kMaxLoadedCount)});
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }
  absl::Status operator()(const CatchUp& m) const {
    absl::Status status = First({CheckOptional(spec, m.decision),
                                 CheckCount("sources", m.sources.size(), spec.shards.size())});
    for (const ServerId source : m.sources) {
      if (status.ok()) status = CheckRange("source", source, -1, spec.server_count - 1);
    }
    return status;
  }
  absl::Status operator()(const OpenJob& m) const {
    if (m.placement == nullptr) return absl::InvalidArgumentError("there is no placement");
    return First({CheckWholePlacement(spec, *m.placement),
                  m.layout == nullptr ? absl::OkStatus() : CheckBoxes(spec, *m.layout),
                  CheckStep("step of the kept flush", m.kept.step)});
  }
  absl::Status operator()(const Flush& m) const {
    return CheckStep("step of the kept flush", m.kept.step);
  }
  absl::Status operator()(const Absent& m) const {
    return First({CheckRange("number of tensors", static_cast<int64_t>(m.tensors.size()), 1,
                             static_cast<int64_t>(spec.tensors.size())),
                  CheckTensors(spec, m.tensors)});
  }
  absl::Status operator()(const Prepare& m) const {
    if (m.decision == nullptr) return absl::InvalidArgumentError("there is no decision");
    return CheckDecision(spec, *m.decision);
  }
  absl::Status operator()(const Prepared& m) const {
    return CheckRange("level", static_cast<int64_t>(m.level), 0,
                      static_cast<int64_t>(Level::kReplicatedJournaled));
  }
  template <typename Other>
  absl::Status operator()(const Other&) const {
    return absl::OkStatus();
  }
};

// The fields that many kinds of messages have.
template <typename M>
absl::Status CheckCounters(const M& m, int64_t epoch) {
  const int64_t most = std::min(std::max<int64_t>(epoch, 0) + kMaxEpochRise, kMaxCounter);
  absl::Status status = CheckRange("epoch", m.epoch, 0, most);
  if constexpr (requires { m.incarnation; })
    status.Update(CheckRange("incarnation", m.incarnation, 0, INT64_MAX));
  if constexpr (requires { m.generation; })
    status.Update(CheckRange("generation", m.generation, 0, kMaxCounter));
  if constexpr (requires { m.step; }) status.Update(CheckStep("step", m.step));
  if constexpr (requires { m.committed_step; }) status.Update(CheckStep("step", m.committed_step));
  if constexpr (requires { m.attempt; })
    status.Update(CheckRange("attempt", m.attempt, 0, kMaxCounter));
  if constexpr (requires { m.rank; }) status.Update(CheckRange("rank", m.rank, 0, INT32_MAX));
  return status;
}

template <typename M>
const char* KindOf() {
  if constexpr (std::is_same_v<M, Register>) return "Register";
  if constexpr (std::is_same_v<M, RecoverReport>) return "RecoverReport";
  if constexpr (std::is_same_v<M, StageReport>) return "StageReport";
  if constexpr (std::is_same_v<M, Recover>) return "Recover";
  if constexpr (std::is_same_v<M, Restore>) return "Restore";
  if constexpr (std::is_same_v<M, OpenJob>) return "OpenJob";
  if constexpr (std::is_same_v<M, Flush>) return "Flush";
  if constexpr (std::is_same_v<M, Absent>) return "Absent";
  if constexpr (std::is_same_v<M, Prepare>) return "Prepare";
  if constexpr (std::is_same_v<M, Discard>) return "Discard";
  return "message";
}

}  // namespace

absl::Status CheckMessage(const JobSpec& spec, ServerId self, ServerId from, int64_t epoch,
                          const Message& message) {
  if (from < 0 || from >= spec.server_count || from == self)
    return absl::InvalidArgumentError(absl::StrCat("a message to server ", self, " of ",
                                                   spec.server_count, " names ", from,
                                                   " as its sender"));
  return std::visit(
      [&](const auto& content) {
        using M = std::decay_t<decltype(content)>;
        absl::Status status = CheckCounters(content, epoch);
        if (status.ok()) status = BodyCheck{spec, from}(content);
        if (status.ok()) return status;
        return absl::InvalidArgumentError(
            absl::StrCat(KindOf<M>(), " of server ", from, ": ", status.message()));
      },
      message);
}

absl::Status CheckDecision(const JobSpec& spec, const DecisionRecord& decision) {
  absl::Status status =
      First({CheckRange("kind of decision", static_cast<int64_t>(decision.kind), 0,
                        static_cast<int64_t>(DecisionKind::kLoad)),
             CheckRange("epoch of a decision", decision.epoch, 0, kMaxCounter),
             CheckRange("generation of a decision", decision.generation, 0, kMaxCounter),
             CheckRange("step of a decision", decision.step, 0, kMaxCounter),
             CheckRange("attempt of a decision", decision.attempt, 0, kMaxCounter),
             CheckCount("applied_count", decision.applied_count.size(), spec.tensors.size()),
             CheckCount("untouched", decision.untouched.size(), spec.tensors.size())});
  for (const int64_t count : decision.applied_count) {
    if (status.ok()) status = CheckRange("applied_count", count, 0, kMaxCounter);
  }
  if (!status.ok()) return status;
  if (Identify(decision) == decision.identity) return status;
  return absl::InvalidArgumentError(absl::StrCat("a decision of step ", decision.step,
                                                 " has identity ", ToString(Identify(decision)),
                                                 ", not ", ToString(decision.identity)));
}

absl::Status CheckBoxes(const JobSpec& spec, const Layout& layout) {
  const auto count = static_cast<int64_t>(spec.tensors.size());
  for (Rank rank = 0; rank < layout.world_size(); ++rank) {
    for (const Contribution& part : layout.by_rank[rank]) {
      absl::Status status = CheckRange("tensor", part.tensor, 0, count - 1);
      if (status.ok())
        status = CheckRange("mode", static_cast<int64_t>(part.mode), 0,
                            static_cast<int64_t>(Mode::kNone));
      if (status.ok() && !part.boxes.empty()) {
        const Shape& shape = spec.tensors[part.tensor].shape;
        const absl::StatusOr<uint64_t> elements = ElementCount(shape);
        status = elements.status();
        for (const Box& box : part.boxes) {
          if (status.ok()) status = ValidateBox(box, shape, *elements);
        }
      }
      if (!status.ok())
        return absl::InvalidArgumentError(
            absl::StrCat("layout of rank ", rank, ": ", status.message()));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckRecord(const JobSpec& spec, const JobRecord& record) {
  absl::Status status =
      First({CheckRange("version", record.version, 0, kMaxCounter),
             CheckRange("epoch", record.epoch, 0, kMaxCounter),
             CheckRange("generation", record.generation, 0, kMaxCounter),
             CheckRange("formed generation", record.formed, 0, record.generation),
             CheckStep("rollback_step", record.rollback_step),
             record.in_sync.empty() ? absl::OkStatus() : CheckPlacement(spec, record.in_sync),
             record.layout == nullptr ? absl::OkStatus() : CheckBoxes(spec, *record.layout)});
  if (status.ok()) return status;
  return absl::DataLossError(absl::StrCat("the stored record of the job: ", status.message()));
}

absl::Status CheckImage(const JobSpec& spec, ServerId self, const ParticipantImage& image) {
  absl::Status status =
      First({CheckRange("epoch", image.epoch, 0, kMaxCounter),
             CheckRange("generation", image.generation, 0, kMaxCounter),
             CheckRange("attempt", image.attempt, 0, kMaxCounter),
             CheckStep("discarded_step", image.discarded_step),
             CheckRange("discarded_attempt", image.discarded_attempt, 0, kMaxCounter),
             CheckReports(spec, self, image.shards), CheckOptional(spec, image.last_applied),
             CheckOptional(spec, image.prepared)});
  for (const StagedPiece& piece : image.pieces) {
    ShardId last = -1;
    if (status.ok()) status = CheckShard(spec, self, piece.key.shard, &last);
    if (status.ok()) status = CheckRange("applied_count", piece.applied_count, -1, kMaxLoadedCount);
  }
  for (const ParticipantImage::AbsentTensors& absent : image.absent) {
    if (status.ok()) status = CheckTensors(spec, absent.tensors);
  }
  if (status.ok()) return status;
  return absl::DataLossError(
      absl::StrCat("the stored image of the step machine: ", status.message()));
}

}  // namespace orlop::step
