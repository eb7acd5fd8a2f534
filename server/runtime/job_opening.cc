#include "server/runtime/job_opening.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "proto/limits.h"
#include "server/durability/flush.h"
#include "server/job/contributions.h"
#include "server/job/job_model.h"
#include "server/job/step_codec.h"
#include "server/runtime/environment.h"
#include "server/shards/shard_store.h"
#include "server/step/check.h"
#include "server/step/job.h"
#include "server/step/messages.h"
#include "spdlog/spdlog.h"
#include "storage/store.h"

namespace orlop::server {
namespace {

// The factor of the incarnations on existing disks (OpenJob). With a smaller one a number could
// come again.
constexpr uint64_t kIncarnationStride = 4096;
static_assert(kMaxServers <= kIncarnationStride);

absl::StatusOr<std::unique_ptr<ShardStore>> CreateShards(const Environment& environment,
                                                         const JobModel& model) {
  auto shards = ShardStore::Create(model.LayoutFor(environment.self), environment.tiers);
  if (!shards.ok() || !model.definition().has_optimizer()) return shards;
  absl::Status configured = (*shards)->Configure(model.Optimizers());
  if (!configured.ok()) return configured;
  return shards;
}

// Returns the flushes that the leader may offer for a rollback: those that are not damaged, each
// with the decision that made it.
absl::StatusOr<std::vector<step::RecoverReport::Flush>> KnownFlushes(const Environment& environment,
                                                                     const JobModel& model) {
  std::vector<step::RecoverReport::Flush> flushes;
  absl::StatusOr<std::vector<FlushInfo>> found =
      ListFlushes(environment.data->store(), model.job());
  if (!found.ok()) return found.status();
  for (const FlushInfo& info : *found) {
    absl::Status read = absl::DataLossError("its head is damaged");
    if (!info.damaged)
      read = ReadFlushHeader(environment.data->store(), model.job(), info.step).status();
    if (!read.ok()) {
      spdlog::error("job {}: the flush with number {} is not offered: {}", model.job(), info.serial,
                    std::string(read.message()));
      continue;
    }
    if (step::DecisionPtr decision = FlushedDecision(environment, model, info.step))
      flushes.push_back({info.step, decision->identity});
  }
  return flushes;
}

// Fills the opened job's shards, layout and image from the newest flush. After an error the shards
// are of no version and must not be used.
absl::Status LoadFlushed(const Environment& environment, const JobModel& model,
                         const FlushInfo& newest, OpenedJob* opened) {
  if (newest.damaged) return absl::DataLossError("the head of the newest flush is damaged");
  const storage::Store& store = environment.data->store();
  absl::StatusOr<FlushHeader> header = ReadFlushHeader(store, model.job(), newest.step);
  if (!header.ok()) return header.status();
  absl::StatusOr<StoredImage> stored = ParseImage(header->machine);
  if (!stored.ok()) return stored.status();
  absl::Status checked = step::CheckImage(*model.spec(), environment.self, stored->image);
  if (checked.ok() && stored->layout != nullptr)
    checked = step::CheckBoxes(*model.spec(), *stored->layout);
  if (!checked.ok()) return absl::DataLossError(checked.message());
  if (stored->layout != nullptr) {
    absl::Status room =
        opened->shards->SetLayout(PiecesFor(model, opened->shards->layout(), *stored->layout));
    if (!room.ok()) return room;
  }
  absl::Status loaded =
      LoadFlush(store, model.job(), header->step, /*with_staged=*/true, opened->shards.get(),
                [&environment] { return environment.must_end(); });
  if (!loaded.ok()) return loaded;
  opened->layout = stored->layout;
  opened->image = std::move(stored->image);
  opened->image.has_memory = true;
  return absl::OkStatus();
}

// Whether a clean mark was left by that process, or kept by it.
bool NamesProcess(const std::string& mark, uint64_t process) {
  const std::vector<std::string> processes = absl::StrSplit(mark, ',');
  return std::find(processes.begin(), processes.end(), absl::StrCat(process)) != processes.end();
}

// Loads the newest flush if CleanKey says that it is all of the job's state, as the last process
// that started the job has left it. If it is damaged, only this job loses its memory: the server
// starts, with OK.
absl::Status LoadIfClean(const Environment& environment, const JobModel& model, OpenedJob* opened) {
  absl::StatusOr<std::vector<FlushInfo>> flushes =
      ListFlushes(environment.data->store(), model.job());
  if (!flushes.ok()) return flushes.status();
  const absl::StatusOr<std::string> clean = environment.data->GetValue(CleanKey(model.job()));
  if (!clean.ok() && !absl::IsNotFound(clean.status())) return clean.status();
  if (!clean.ok() || flushes->empty()) return absl::OkStatus();
  const uint64_t last = environment.data->last_started();
  if (last > 0 && !clean->empty() && !NamesProcess(*clean, last)) {
    spdlog::error(
        "job {}: the store in {} is older than its last process, number {}: what that one "
        "wrote is gone",
        model.job(), environment.data->path(), last);
    return absl::OkStatus();
  }
  if (environment.data->has_lost_writes()) return absl::OkStatus();
  absl::Status loaded = LoadFlushed(environment, model, flushes->front(), opened);
  if (!absl::IsDataLoss(loaded)) return loaded;
  spdlog::error("job {}: the state of the last stop cannot be read: {}", model.job(),
                std::string(loaded.message()));
  opened->shards.reset();  // the new shards need this memory
  auto shards = CreateShards(environment, model);
  if (!shards.ok()) return shards.status();
  opened->shards = *std::move(shards);
  return absl::OkStatus();
}

// Leaves only those flushes that can be read whole: others must not be offered. Reads all of them.
//   Status  Cancelled; as CreateShards
absl::Status CheckFlushes(const Environment& environment, const JobModel& model,
                          std::vector<step::RecoverReport::Flush>* flushes, OpenedJob* opened) {
  if (flushes->empty()) return absl::OkStatus();
  absl::Status cancelled;
  std::erase_if(*flushes, [&](const step::RecoverReport::Flush& flush) {
    const absl::Status read =
        LoadFlush(environment.data->store(), model.job(), flush.step, /*with_staged=*/false,
                  opened->shards.get(), [&environment] { return environment.must_end(); });
    if (absl::IsCancelled(read)) cancelled = read;
    if (absl::IsDataLoss(read) || absl::IsFailedPrecondition(read))
      spdlog::error("job {}: the flush of step {} is not offered: {}", model.job(), flush.step,
                    std::string(read.message()));
    return absl::IsDataLoss(read) || absl::IsFailedPrecondition(read);
  });
  if (!cancelled.ok()) return cancelled;
  opened->shards.reset();  // the new shards need this memory
  auto shards = CreateShards(environment, model);
  if (!shards.ok()) return shards.status();
  opened->shards = *std::move(shards);
  return absl::OkStatus();
}

}  // namespace

std::string CleanKey(const std::string& job) { return absl::StrCat("clean/", job); }
std::string RecordKey(const std::string& job) { return absl::StrCat("record/", job); }
std::string IncarnationKey(const std::string& job) { return absl::StrCat("incarnation/", job); }

absl::StatusOr<OpenedJob> OpenJob(const Environment& environment, const JobModel& model,
                                  bool is_new) {
  OpenedJob opened;
  auto shards = CreateShards(environment, model);
  if (!shards.ok()) return shards.status();
  opened.shards = *std::move(shards);
  absl::StatusOr<uint64_t> epoch = environment.data->Epoch(model.job());
  if (!epoch.ok()) return epoch.status();
  if (*epoch > static_cast<uint64_t>(step::kMaxCounter))
    return absl::DataLossError(
        absl::StrCat("the stored epoch is ", *epoch, ", over the limit of ", step::kMaxCounter));
  if (!is_new)
    if (absl::Status loaded = LoadIfClean(environment, model, &opened); !loaded.ok()) return loaded;
  if (!opened.image.has_memory)
    if (auto before = environment.data->GetValue(IncarnationKey(model.job())); before.ok())
      if (!absl::SimpleAtoi(*before, &opened.image.incarnation))
        return absl::DataLossError(absl::StrCat("the stored incarnation is '", *before, "'"));
  opened.image.epoch = std::max(opened.image.epoch, static_cast<int64_t>(*epoch));
  absl::StatusOr<std::vector<step::RecoverReport::Flush>> known = KnownFlushes(environment, model);
  if (!known.ok()) return known.status();
  if (!opened.image.has_memory)
    if (absl::Status checked = CheckFlushes(environment, model, &*known, &opened); !checked.ok())
      return checked;
  opened.image.flushes = *std::move(known);
  // Each server counts its own starts. The stride keeps the numbers of different servers apart.
  opened.incarnation =
      static_cast<int64_t>(environment.data->incarnation() * kIncarnationStride) + environment.self;
  absl::Status noted =
      environment.data->PutValue(IncarnationKey(model.job()), absl::StrCat(opened.incarnation));
  if (!noted.ok()) return noted;
  return opened;
}

absl::Status KeepCleanMark(const Environment& environment, const std::string& job) {
  const uint64_t last = environment.data->last_started();
  const absl::StatusOr<std::string> clean = environment.data->GetValue(CleanKey(job));
  if (absl::IsNotFound(clean.status())) return absl::OkStatus();
  if (!clean.ok()) return clean.status();
  if (environment.data->has_lost_writes()) return absl::OkStatus();
  if (last == 0 || !NamesProcess(*clean, last)) return absl::OkStatus();
  return environment.data->PutValue(CleanKey(job),
                                    absl::StrCat(last, ",", environment.data->incarnation()));
}

absl::StatusOr<step::JobRecord> ReadJobRecord(const Environment& environment,
                                              const JobModel& model) {
  absl::StatusOr<std::string> bytes = environment.data->GetValue(RecordKey(model.job()));
  if (absl::IsNotFound(bytes.status())) return step::JobRecord();
  if (!bytes.ok()) return bytes.status();
  absl::StatusOr<step::JobRecord> record = ParseJobRecord(*bytes);
  if (!record.ok()) return record;
  if (absl::Status checked = step::CheckRecord(*model.spec(), *record); !checked.ok())
    return checked;
  return record;
}

step::DecisionPtr FlushedDecision(const Environment& environment, const JobModel& model,
                                  int64_t step) {
  absl::StatusOr<FlushHeader> header =
      ReadFlushHeader(environment.data->store(), model.job(), step);
  if (!header.ok()) return nullptr;
  absl::StatusOr<StoredImage> stored = ParseImage(header->machine);
  if (!stored.ok()) return nullptr;
  const step::DecisionPtr& decision = stored->image.last_applied;
  if (decision == nullptr || !step::CheckDecision(*model.spec(), *decision).ok()) return nullptr;
  return decision;
}

}  // namespace orlop::server
