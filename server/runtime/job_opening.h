// Opens a job from disk: its shards with what the last clean stop wrote of them, and the state with
// which the job's step machines begin.
//
// Format on disk (values of storage::DataDirectory, one each per job):
//   clean/JOB        empty; present while the newest flush is all of the job's state: from the end
//                    of a clean stop until the job starts again
//   record/JOB       the leader's record, as server/job/step_codec.h serialises it
//   incarnation/JOB  decimal number of the last process that opened the job on this server
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/job/job_model.h"
#include "server/runtime/environment.h"
#include "server/shards/shard_store.h"
#include "server/step/participant.h"

namespace orlop::server {

// The keys of the three values.
std::string CleanKey(const std::string& job);
std::string RecordKey(const std::string& job);
std::string IncarnationKey(const std::string& job);

// A job as it was opened; the arguments of step::Participant.
struct OpenedJob {
  std::unique_ptr<ShardStore> shards;
  step::ParticipantImage image;  // what the participant can report to the leader
  // The contribution layout that the staged pieces of `image` belong to; null if there is none.
  std::shared_ptr<const step::Layout> layout;
  // The participant's fresh_incarnation, synced to disk. No server has used it before.
  int64_t incarnation = 0;
};

// Opens the job that `model` describes. `is_new`: it was just created and has nothing on disk. If
// the state of the last clean stop is damaged, the job opens without it (image.has_memory false)
// and the log says why. Waits for the disk.
//   Status  ResourceExhausted (BUDGET), DataLoss (a value cannot be read), or the disk's own error
absl::StatusOr<OpenedJob> OpenJob(const Environment& environment, const JobModel& model,
                                  bool is_new);

// Carries the clean mark of a job over a process that does not open it: what was all of its state
// before is so after, unless the store has lost writes. Call it before DataDirectory::MarkStarted.
absl::Status KeepCleanMark(const Environment& environment, const std::string& job);

// Returns the leader's record of a job; a default one if none was written yet.
//   Status  DataLoss: it cannot be read
absl::StatusOr<step::JobRecord> ReadJobRecord(const Environment& environment,
                                              const JobModel& model);

// Returns the decision that made the flush of `step`; null if the flush is damaged or missing, or
// is of a job that was LOADING.
step::DecisionPtr FlushedDecision(const Environment& environment, const JobModel& model,
                                  int64_t step);

}  // namespace orlop::server
