// What each thing that a schedule may meet is called in the summary of the test.
#include "tests/simulator.h"

namespace orlop::step {

// NOLINTNEXTLINE(readability-function-size): two lines for each thing
const char* Describe(Met met) {
  switch (met) {
    case Met::kMemory:
      return "level MEMORY";
    case Met::kJournaled:
      return "level JOURNALED";
    case Met::kReplicated:
      return "level REPLICATED";
    case Met::kReplicatedJournaled:
      return "level REPLICATED_JOURNALED";
    case Met::kThreeCopies:
      return "three copies or more of each shard";
    case Met::kFourServers:
      return "four servers or more";
    case Met::kThreeWorkers:
      return "three workers or more";
    case Met::kMessageLost:
      return "message lost";
    case Met::kMessageRepeated:
      return "message repeated";
    case Met::kMessageDelayed:
      return "message delayed, others overtake it";
    case Met::kCommitRepeated:
      return "CommitStep repeated by the network";
    case Met::kCommitAskedAgain:
      return "CommitStep asked again, answered from what is stored";
    case Met::kPushRepeated:
      return "push sent again, answered from what is stored";
    case Met::kCrash:
      return "server crash";
    case Met::kLeaderCrashUndecided:
      return "leader crash, step not decided";
    case Met::kLeaderCrashDecided:
      return "leader crash between decided and prepared everywhere";
    case Met::kWorkerCrash:
      return "worker crash";
    case Met::kPowerLoss:
      return "power loss of all servers at once";
    case Met::kLostDisk:
      return "disk lost";
    case Met::kTornWrite:
      return "torn disk writes: unsynced ones lost, some or all";
    case Met::kRecordLost:
      return "write of the job's record lost in a crash";
    case Met::kCleanStop:
      return "clean stop";
    case Met::kStopInStep:
      return "clean stop of a server with a step prepared";
    case Met::kTakeover:
      return "takeover by another leader";
    case Met::kDeposed:
      return "leader that finds itself replaced";
    case Met::kApply:
      return "APPLY";
    case Met::kSkip:
      return "SKIP";
    case Met::kLaterLoad:
      return "LOAD after the first";
    case Met::kAbsent:
      return "tensor absent from all";
    case Met::kAbort:
      return "AbortStep obeyed";
    case Met::kLaterAttempt:
      return "commit of a second attempt or later";
    case Met::kNewGeneration:
      return "rejoin with a new generation";
    case Met::kOtherWorldSize:
      return "rejoin with another number of workers";
    case Met::kPreparedAgain:
      return "decision of a former epoch prepared again";
    case Met::kDiscard:
      return "discard of an attempt by recovery";
    case Met::kAttemptCarriedOn:
      return "attempt carried on into a new epoch";
    case Met::kCopyLeftOut:
      return "copy left out";
    case Met::kCopyCameBack:
      return "copy back in sync";
    case Met::kRollback:
      return "rollback accepted";
    case Met::kJobLost:
      return "MEMORY job with nothing to roll back to";
    case Met::kNoRoom:
      return "push refused for lack of room";
    case Met::kPull:
      return "pull compared with the replay";
    case Met::kHold:
      return "hold";
    case Met::kRankContested:
      return "rank that another process holds, refused";
    case Met::kFirstLoadRefused:
      return "first LOAD that leaves a shard unset, refused";
    case Met::kStagingFailed:
      return "shard that could not be staged";
    case Met::kFailureLost:
      return "report of a failed staging lost";
    case Met::kPrepareFailed:
      return "decision that could not be written";
    case Met::kDamage:
      return "shard damaged in the middle of a step";
    case Met::kDamageTold:
      return "damage told, the server started anew";
    case Met::kDamageBesideOthers:
      return "damaged shard on a server that serves others";
    case Met::kLayoutRefused:
      return "layout that a server has no room for";
    case Met::kLayoutTakenLater:
      return "refused layout taken later";
    case Met::kFlush:
      return "flush of a running job";
    case Met::kFlushFailed:
      return "flush that a server cannot write";
    case Met::kOldFlushErased:
      return "old flush erased to make room for the next";
    case Met::kBuffer:
      return "job with a tensor without gradient";
    case Met::kPieceRefused:
      return "piece that a server's store refuses after its step machine took it";
    case Met::kCount:
      break;
  }
  return "?";
}

}  // namespace orlop::step
