// A whole job in one thread and virtual time: servers with disks, workers, an operator and a
// network that loses, repeats, delays and reorders; everything that happens follows from a seed.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace orlop::step {

// What a schedule met. The schedules together must meet every one of these.
enum class Met : uint8_t {
  kMemory,
  kJournaled,
  kReplicated,
  kReplicatedJournaled,  // the level of the job, in its order
  kThreeCopies,
  kFourServers,
  kThreeWorkers,
  kMessageLost,
  kMessageRepeated,
  kMessageDelayed,
  kCommitRepeated,
  kCommitAskedAgain,
  kPushRepeated,
  kCrash,
  kLeaderCrashUndecided,
  kLeaderCrashDecided,
  kWorkerCrash,
  kPowerLoss,
  kLostDisk,
  kTornWrite,
  kRecordLost,
  kCleanStop,
  kStopInStep,
  kTakeover,
  kDeposed,
  kApply,
  kSkip,
  kLaterLoad,
  kAbsent,
  kAbort,
  kLaterAttempt,
  kNewGeneration,
  kOtherWorldSize,
  kPreparedAgain,
  kDiscard,
  kAttemptCarriedOn,
  kCopyLeftOut,
  kCopyCameBack,
  kRollback,
  kJobLost,
  kNoRoom,
  kPull,
  kHold,
  kRankContested,
  kFirstLoadRefused,
  kStagingFailed,
  kFailureLost,
  kPrepareFailed,
  kDamage,
  kDamageTold,
  kDamageBesideOthers,
  kLayoutRefused,
  kLayoutTakenLater,
  kFlush,
  kFlushFailed,
  kOldFlushErased,
  kBuffer,
  kPieceRefused,
  kCount
};
inline constexpr size_t kMetCount = static_cast<size_t>(Met::kCount);
const char* Describe(Met met);

struct SimulationResult {
  bool ok = false;
  std::string failure;      // what the oracle, or the watch on progress, found
  std::string description;  // level, servers, copies, workers
  int64_t acknowledged_steps = 0;
  int64_t epochs = 0;
  int64_t events = 0;
  std::array<int64_t, kMetCount> met = {};  // how often, by Met
  bool is_lost = false;  // level MEMORY: nothing common to roll back to, and the job said so
};

// Runs one schedule. The same seed gives the same run, event by event.
SimulationResult RunSchedule(uint64_t seed);

}  // namespace orlop::step
