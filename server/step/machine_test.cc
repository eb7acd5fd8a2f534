// Tests of single rules of the leader and the participant, most of them with one server, two ranks
// and no lost message. The simulator (tests/) tests all rules together, with faults.
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/box.h"
#include "gtest/gtest.h"
#include "server/step/actions.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/leader.h"
#include "server/step/messages.h"
#include "server/step/participant.h"
#include "server/step/reason.h"

namespace orlop::step {
namespace {

constexpr int64_t kNow = 1000;

// A leader and a participant on one server; messages and completions are delivered at once.
class Job : public ::testing::Test {
 protected:
  Job() {
    spec_ = std::make_shared<JobSpec>();
    spec_->manifest_digest = {1, 2};
    spec_->tensors = {{"w", {4}, true}, {"b", {2}, true}};
    spec_->shards = {{0, {0, 4}, {0}}, {1, {0, 2}, {0}}};
    Begin(spec_);
  }

  // Begins a new job. The participant's specification is `of_participant`, the leader's is spec_.
  void Begin(std::shared_ptr<const JobSpec> of_participant) {
    participant_ = std::make_unique<Participant>(std::move(of_participant), 0, 0,
                                                 ParticipantImage{}, 7, ParticipantOptions{});
    leader_ = std::make_unique<Leader>(
        spec_, 0, JobRecord{},
        [this](const ScalarInputs& inputs) -> absl::StatusOr<std::string> {
          counts_ = *inputs.applied_count;
          norm_ = inputs.sum_of_squares;
          return std::string("scalars");
        },
        LeaderOptions{});
    Actions actions;
    leader_->OnTick(kNow, &actions);
    Run(std::move(actions));
  }

  void Run(Actions actions) {
    std::deque<Action> queue(actions.begin(), actions.end());
    while (!queue.empty()) {
      Action action = std::move(queue.front());
      queue.pop_front();
      Actions next;
      if (auto* send = std::get_if<Send>(&action)) {
        if (hold_prepares_ && std::holds_alternative<Prepare>(send->message)) continue;
        if (lose_seal_replies_ && std::holds_alternative<SealReply>(send->message)) continue;
        if (ForLeader(send->message)) {
          leader_->OnMessage(0, send->message, kNow, &next);
          const auto* staged = std::get_if<StageReport>(&send->message);
          if (staged != nullptr && staged->is_load && overtaken_) {
            leader_->OnMessage(0, *std::exchange(overtaken_, std::nullopt), kNow, &next);
          }
        } else {
          participant_->OnMessage(0, send->message, kNow, &next);
        }
      } else if (auto* answer = std::get_if<Answer>(&action)) {
        answers_[answer->request] = *answer;
      } else if (auto* record = std::get_if<PersistRecord>(&action)) {
        leader_->OnRecordPersisted(record->record.version, true, kNow, &next);
      } else if (auto* epoch = std::get_if<PersistEpoch>(&action)) {
        participant_->OnEpochDurable(epoch->epoch, kNow, &next);
      } else if (auto* take = std::get_if<TakeLayout>(&action)) {
        ++layouts_asked_;
        if (!hold_layouts_) {
          participant_->OnLayoutTaken(take->layout->digest, layout_status_, kNow, &next);
        }
      } else if (auto* stage = std::get_if<StageShard>(&action)) {
        ShardStaged staged{stage->shard, {9, 9}, 2.0, non_finite_};
        if (staging_status_.ok()) {
          participant_->OnShardStaged(stage->step, stage->attempt, staged, kNow, &next);
        } else {
          participant_->OnShardStagingFailed(stage->shard, stage->step, stage->attempt,
                                             staging_status_, kNow, &next);
        }
      } else if (auto* persist = std::get_if<PersistDecision>(&action)) {
        if (prepare_status_.ok()) {
          participant_->OnDecisionDurable(persist->decision->identity, kNow, &next);
        } else {
          participant_->OnPrepareFailed(persist->decision->identity, prepare_status_, kNow, &next);
        }
      } else if (auto* discard = std::get_if<PersistDiscard>(&action)) {
        participant_->OnDiscardDurable(discard->step, discard->attempt, kNow, &next);
      } else if (auto* apply = std::get_if<StartApply>(&action)) {
        if (!hold_applies_) {
          participant_->OnShardApplied(apply->shard, apply->decision->step, kNow, &next);
        }
      } else if (auto* serve = std::get_if<Serve>(&action)) {
        served_ = serve->version;
      }
      queue.insert(queue.end(), next.begin(), next.end());
    }
  }

  static std::vector<Contribution> Contributions(Rank rank, bool with_gap = false) {
    const auto begin = static_cast<uint64_t>(rank) * 2;
    return {{0, Mode::kExactlyOnce, {FlatBox(begin, with_gap ? 1 : 2)}},
            {1, Mode::kSum, {FlatBox(0, 2)}}};
  }

  RequestId Join(Rank rank, int64_t generation, int64_t min_committed_step = kLoading,
                 bool with_gap = false) {
    const JoinRequest join{rank, 2, generation, Contributions(rank, with_gap), min_committed_step};
    Actions actions;
    leader_->OnJoin(++request_, join, kNow, &actions);
    Run(std::move(actions));
    return request_;
  }

  PushPiece Piece(Rank rank, ShardId shard, int64_t step, int64_t attempt = 1) {
    PushPiece piece;
    piece.key = {generation_, step, attempt, shard, rank, 0};
    piece.payload = {static_cast<uint64_t>(rank + 1), static_cast<uint64_t>(shard + 1)};
    return piece;
  }

  absl::Status Push(const PushPiece& piece, bool has_room = true) {
    Actions actions;
    bool keep = false;
    participant_->OnPush(++request_, piece, has_room, kNow, &keep, &actions);
    Run(std::move(actions));
    return answers_[request_].status;
  }

  RequestId Commit(Rank rank, int64_t step, int64_t attempt = 1, bool is_load = false,
                   std::vector<TensorId> absent = {}, uint64_t lr = 1) {
    CommitRequest commit;
    commit.rank = rank;
    commit.generation = generation_;
    commit.step = step;
    commit.attempt = attempt;
    commit.is_load = is_load;
    commit.absent = std::move(absent);
    if (!is_load) commit.groups = {{{{"lr", lr}, {"eps", 2}}}};
    Actions actions;
    leader_->OnCommitStep(++request_, commit, kNow, &actions);
    Run(std::move(actions));
    return request_;
  }

  absl::Status Abort(int64_t step, int64_t attempt) {
    Actions actions;
    leader_->OnAbortStep(++request_, {0, generation_, step, attempt}, kNow, &actions);
    Run(std::move(actions));
    return answers_[request_].status;
  }

  void Form() {
    generation_ = answers_[Join(0, 0)].generation_issued;
    Join(0, generation_);
    const Answer joined = answers_[Join(1, generation_)];
    ASSERT_TRUE(joined.status.ok()) << joined.status;
    first_attempt_ = joined.position.attempt;  // a new generation closes the attempt before it
  }

  void Load() {
    Form();
    for (ShardId shard : {0, 1}) {
      PushPiece piece = Piece(0, shard, 0, first_attempt_);
      piece.is_load = true;
      ASSERT_TRUE(Push(piece).ok());
    }
    Commit(0, 0, first_attempt_, true);
    ASSERT_TRUE(answers_[Commit(1, 0, first_attempt_, true)].status.ok());
  }

  void PushAll(int64_t step, int64_t attempt = 1) {
    for (Rank rank : {0, 1}) {
      for (ShardId shard : {0, 1})
        ASSERT_EQ(Push(Piece(rank, shard, step, attempt)), absl::OkStatus());
    }
  }

  RequestId Pull(ShardId shard, int64_t version) {
    Actions actions;
    served_ = -2;
    participant_->OnPull(++request_, shard, version, kNow, &actions);
    Run(std::move(actions));
    return request_;
  }

  void Damage(ShardId shard, int64_t step, const absl::Status& status) {
    Actions actions;
    participant_->OnShardDamaged(shard, step, status, kNow, &actions);
    Run(std::move(actions));
  }

  std::shared_ptr<JobSpec> spec_;
  std::unique_ptr<Participant> participant_;
  std::unique_ptr<Leader> leader_;
  std::map<RequestId, Answer> answers_;
  RequestId request_ = 0;
  int64_t generation_ = 0;
  int64_t first_attempt_ = 0;
  int64_t served_ = -2;
  uint64_t non_finite_ = 0;
  bool hold_applies_ = false;
  bool hold_prepares_ = false;
  bool lose_seal_replies_ = false;
  std::optional<StageReport> overtaken_;  // it arrives after the next report of a LOAD
  bool hold_layouts_ = false;
  int layouts_asked_ = 0;
  absl::Status layout_status_;
  absl::Status staging_status_;
  absl::Status prepare_status_;
  std::vector<int64_t> counts_;
  double norm_ = 0;
};

TEST_F(Job, JoinRefusesALayoutWithAGapToAllRanks) {
  generation_ = answers_[Join(0, 0)].generation_issued;
  const RequestId first = Join(0, generation_, kLoading, true);
  const RequestId second = Join(1, generation_);
  EXPECT_TRUE(absl::IsInvalidArgument(answers_[first].status)) << answers_[first].status;
  EXPECT_TRUE(absl::IsInvalidArgument(answers_[second].status));
}

TEST_F(Job, ARankIsHeldByTheFirstClientUntilANewerGenerationIsAskedFor) {
  generation_ = answers_[Join(0, 0)].generation_issued;
  const auto claim = [&](Rank rank, int64_t generation, const std::string& client) {
    return leader_->ClaimRank({rank, 2, generation, {}, kLoading, client});
  };
  EXPECT_TRUE(claim(0, generation_, "a").ok());
  EXPECT_TRUE(claim(0, generation_, "a").ok());
  EXPECT_TRUE(claim(1, generation_, "b").ok());
  const absl::Status refused = claim(0, generation_, "b");
  EXPECT_TRUE(absl::IsAlreadyExists(refused));
  EXPECT_EQ(refused.message(), "rank 0 of generation 1 is held by another process ('a')");
  EXPECT_EQ(leader_->Status().joined_ranks, (std::vector<Rank>{0, 1}));
  EXPECT_TRUE(absl::IsAlreadyExists(answers_[Join(0, generation_)].status));  // an unnamed client
  EXPECT_TRUE(claim(0, generation_ + 1, "b").ok());  // never issued: claims nothing
  EXPECT_TRUE(absl::IsAlreadyExists(claim(0, generation_, "b")));
  const int64_t next = answers_[Join(0, 0)].generation_issued;
  EXPECT_TRUE(claim(0, next, "b").ok());
  EXPECT_TRUE(claim(0, generation_, "c").ok());  // superseded: Join refuses it, not the claim
  EXPECT_EQ(leader_->Status().joined_ranks, (std::vector<Rank>{0}));
}

TEST_F(Job, IsLoadingUntilTheFirstLoad) {
  Form();
  EXPECT_TRUE(absl::IsFailedPrecondition(Push(Piece(0, 0, 0, first_attempt_))));
  EXPECT_TRUE(absl::IsFailedPrecondition(answers_[Commit(0, 0, first_attempt_)].status));
  EXPECT_TRUE(absl::IsFailedPrecondition(answers_[Pull(0, 0)].status));
}

TEST_F(Job, AFirstLoadThatLeavesAShardUnsetIsRefusedByNameAndEndsTheAttempt) {
  Form();
  PushPiece piece = Piece(0, 0, 0, first_attempt_);
  piece.is_load = true;
  ASSERT_TRUE(Push(piece).ok());
  const RequestId first = Commit(0, 0, first_attempt_, true);
  const RequestId second = Commit(1, 0, first_attempt_, true);
  for (RequestId request : {first, second}) {
    const absl::Status& status = answers_[request].status;
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_EQ(ReasonOf(status), Reason::kLoading);
    ASSERT_TRUE(ShardOf(status).has_value());
    EXPECT_EQ(ShardOf(status)->tensor, "b");
    EXPECT_EQ(ShardOf(status)->index, 0u);
    EXPECT_EQ(answers_[request].position.attempt, first_attempt_ + 1);
  }
}

TEST_F(Job, AFirstLoadMayLeaveOutATensorThatMayBeUnset) {
  spec_->tensors[1].may_be_unset = true;
  Begin(spec_);
  Form();
  PushPiece piece = Piece(0, 0, 0, first_attempt_);
  piece.is_load = true;
  ASSERT_TRUE(Push(piece).ok());
  Commit(0, 0, first_attempt_, true);
  EXPECT_EQ(answers_[Commit(1, 0, first_attempt_, true)].status, absl::OkStatus());
}

TEST_F(Job, CommitsWhenAllRanksAndAllShardsAreIn) {
  Load();
  const RequestId first = Commit(0, 1);
  const RequestId second = Commit(1, 1);
  EXPECT_FALSE(answers_.contains(first));
  PushAll(1);
  ASSERT_TRUE(answers_.contains(first));
  EXPECT_TRUE(answers_[second].status.ok());
  EXPECT_EQ(answers_[first].decision->kind, DecisionKind::kApply);
  EXPECT_EQ(answers_[first].position.committed_step, 1);
  EXPECT_EQ(answers_[first].position.attempt, 1);
  EXPECT_EQ(counts_, (std::vector<int64_t>{1, 1}));
  EXPECT_EQ(norm_, 4.0);
  const RequestId repeated = Commit(0, 1);
  EXPECT_EQ(answers_[repeated].decision, answers_[first].decision);
}

TEST_F(Job, SkipAdvancesTheStepAndNothingElse) {
  Load();
  non_finite_ = 1;
  PushAll(1);
  Commit(0, 1);
  const RequestId skipped = Commit(1, 1);
  EXPECT_EQ(answers_[skipped].decision->kind, DecisionKind::kSkip);
  EXPECT_EQ(answers_[skipped].decision->applied_count, (std::vector<int64_t>{0, 0}));
  non_finite_ = 0;
  PushAll(2);
  Commit(0, 2);
  EXPECT_EQ(answers_[Commit(1, 2)].decision->applied_count, (std::vector<int64_t>{1, 1}));
}

TEST_F(Job, ATensorAbsentFromAllIsUntouchedAndFromSomeIsZero) {
  Load();
  ASSERT_TRUE(Push(Piece(1, 0, 1)).ok());
  Commit(0, 1, 1, false, {0, 1});
  const RequestId committed = Commit(1, 1, 1, false, {1});
  ASSERT_TRUE(answers_.contains(committed));
  EXPECT_EQ(answers_[committed].decision->applied_count, (std::vector<int64_t>{1, 0}));
  EXPECT_EQ(answers_[committed].decision->untouched, (std::vector<uint8_t>{0, 1}));
}

TEST_F(Job, APushedTensorCannotBeAbsent) {
  Load();
  ASSERT_TRUE(Push(Piece(0, 0, 1)).ok());
  EXPECT_TRUE(absl::IsAlreadyExists(answers_[Commit(0, 1, 1, false, {0})].status));
}

TEST_F(Job, DifferingHyperParametersAreRefusedByName) {
  Load();
  Commit(0, 1);
  const RequestId other = Commit(1, 1, 1, false, {}, 5);
  EXPECT_TRUE(absl::IsInvalidArgument(answers_[other].status));
  EXPECT_NE(answers_[other].status.message().find("lr differs"), std::string::npos);
  const RequestId changed = Commit(0, 1, 1, false, {}, 5);
  EXPECT_TRUE(absl::IsInvalidArgument(answers_[changed].status)) << answers_[changed].status;
}

TEST_F(Job, ARepeatedPushIsTheStoredAnswerAndOtherBytesAreRefused) {
  Load();
  PushPiece piece = Piece(0, 0, 1);
  EXPECT_TRUE(Push(piece).ok());
  EXPECT_TRUE(Push(piece).ok());
  EXPECT_EQ(participant_->PiecesOf(0).size(), 1u);
  piece.payload.low = 77;
  EXPECT_TRUE(absl::IsAlreadyExists(Push(piece)));
}

TEST_F(Job, PushesOfOtherStepsAttemptsGenerationsAndEpochsAreRefusedByTheirCodes) {
  Load();
  ASSERT_TRUE(Abort(1, 1).ok());
  EXPECT_TRUE(absl::IsAborted(Push(Piece(0, 0, 1, 1))));
  EXPECT_TRUE(absl::IsUnavailable(Push(Piece(0, 0, 1, 3))));
  EXPECT_TRUE(absl::IsFailedPrecondition(Push(Piece(0, 0, 0, 2))));
  EXPECT_TRUE(absl::IsFailedPrecondition(Push(Piece(0, 0, 2, 2))));
  PushPiece piece = Piece(0, 0, 1, 2);
  piece.key.generation = generation_ - 1;
  EXPECT_TRUE(absl::IsAborted(Push(piece)));
  piece = Piece(0, 0, 1, 2);
  piece.key.region = 5;
  EXPECT_TRUE(absl::IsInvalidArgument(Push(piece)));
  piece = Piece(0, 9, 1, 2);
  EXPECT_TRUE(absl::IsNotFound(Push(piece)));
  piece = Piece(0, 0, 1, 2);
  ASSERT_TRUE(Push(piece).ok());
  piece = Piece(1, 0, 1, 2);
  piece.scale = 2.0;
  EXPECT_TRUE(absl::IsInvalidArgument(Push(piece)));
}

TEST_F(Job, WithoutRoomTheAttemptStaysOpen) {
  Load();
  EXPECT_TRUE(absl::IsResourceExhausted(Push(Piece(0, 0, 1), false)));
  EXPECT_TRUE(Push(Piece(0, 0, 1), true).ok());
  EXPECT_TRUE(Push(Piece(0, 0, 1), false).ok());  // a stored piece needs no room
}

TEST_F(Job, AFailedStagingEndsTheAttemptAndEveryCommitLearnsWhy) {
  Load();
  const RequestId early = Commit(0, 1);
  staging_status_ = absl::ResourceExhaustedError("no room for the sum");
  ASSERT_TRUE(Push(Piece(0, 0, 1)).ok());
  ASSERT_TRUE(Push(Piece(1, 0, 1)).ok());
  EXPECT_EQ(answers_[early].status, staging_status_);
  EXPECT_EQ(answers_[early].position.attempt, 2);
  const Answer late = answers_[Commit(1, 1)];
  EXPECT_TRUE(absl::IsAborted(late.status));
  EXPECT_EQ(std::string(late.status.message()),
            "attempt 1 of step 1 is over, 2 is open: no room for the sum");
  staging_status_ = absl::OkStatus();
  PushAll(1, 2);
  Commit(0, 1, 2);
  EXPECT_TRUE(answers_[Commit(1, 1, 2)].status.ok());
}

TEST_F(Job, AFailedStagingIsToldUntilTheLeaderKnows) {
  Load();
  const RequestId waiting = Commit(0, 1);
  lose_seal_replies_ = true;
  staging_status_ = absl::ResourceExhaustedError("no room for the sum");
  PushAll(1);
  EXPECT_FALSE(answers_.contains(waiting));
  lose_seal_replies_ = false;
  const auto tick = [&](int64_t now_ms) {
    Actions actions;
    participant_->OnTick(now_ms, &actions);
    Run(std::move(actions));
  };
  tick(kNow + 500);
  EXPECT_FALSE(answers_.contains(waiting));
  tick(kNow + 1000);
  EXPECT_EQ(answers_[waiting].status, staging_status_);
}

TEST_F(Job, AFailedStagingOfALoadAnswersItsSeal) {
  Form();
  staging_status_ = absl::DataLossError("the master cannot be read");
  for (ShardId shard : {0, 1}) {
    PushPiece piece = Piece(0, shard, 0, first_attempt_);
    piece.is_load = true;
    ASSERT_TRUE(Push(piece).ok());
  }
  Commit(0, 0, first_attempt_, true);
  EXPECT_EQ(answers_[Commit(1, 0, first_attempt_, true)].status, staging_status_);
}

// A server that takes no gradients calls a step staged from its start, and a LOAD after the Seal.
TEST_F(Job, AReportOfBeforeTheSealThatArrivesAfterItIsIgnored) {
  Load();
  for (ShardId shard : {0, 1}) {
    PushPiece piece = Piece(0, shard, 1);
    piece.is_load = true;
    ASSERT_TRUE(Push(piece).ok());
  }
  overtaken_ = {.epoch = leader_->epoch(), .generation = generation_, .step = 1, .attempt = 1};
  overtaken_->shards = {{.shard = 0, .absent = true}, {.shard = 1, .absent = true}};
  lose_seal_replies_ = true;  // or the first report would end the LOAD
  Commit(0, 1, 1, true);
  Commit(1, 1, 1, true);
  ASSERT_FALSE(overtaken_.has_value());
  lose_seal_replies_ = false;
  Actions actions;
  leader_->OnTick(kNow + 1000, &actions);  // seals again
  Run(std::move(actions));
  EXPECT_EQ(leader_->Status().position.committed_step, 1);
}

// The report of a restarted server may be lost while the leader still has that of the life before.
TEST_F(Job, AServerWhoseEarlierLifeIsInThePlacementReportsAgain) {
  Form();
  OpenJob open{.epoch = leader_->epoch(), .generation = generation_, .attempt = first_attempt_ + 1};
  open.manifest_digest = spec_->manifest_digest;
  open.placement = std::make_shared<Placement>(Placement{{{0, 6}}, {{0, 6}}});
  Actions actions;
  participant_->OnMessage(0, open, kNow, &actions);
  ASSERT_EQ(actions.size(), 1);
  const auto* send = std::get_if<Send>(actions.data());
  ASSERT_NE(send, nullptr);
  const auto* report = std::get_if<RecoverReport>(&send->message);
  ASSERT_NE(report, nullptr);
  EXPECT_EQ(report->incarnation, 7);
}

TEST_F(Job, AServerThatCannotPrepareSaysWhy) {
  auto other = std::make_shared<JobSpec>(*spec_);
  other->arithmetic_version = 2;
  Begin(other);
  Form();
  for (ShardId shard : {0, 1}) {
    PushPiece piece = Piece(0, shard, 0, first_attempt_);
    piece.is_load = true;
    ASSERT_TRUE(Push(piece).ok());
  }
  const RequestId first = Commit(0, 0, first_attempt_, true);
  const RequestId second = Commit(1, 0, first_attempt_, true);
  for (RequestId request : {first, second}) {
    EXPECT_TRUE(absl::IsUnavailable(answers_[request].status));
    EXPECT_EQ(answers_[request].status.message(),
              "the job is recovering: server 0 cannot prepare step 0: server 0 computes with "
              "arithmetic version 2, the decision needs 1");
  }
}

TEST_F(Job, ADecisionThatCannotBeWrittenIsTriedAgainAfterARecovery) {
  spec_->level = Level::kJournaled;
  Begin(spec_);
  prepare_status_ = absl::DataLossError("the journal cannot be written");
  Form();
  for (ShardId shard : {0, 1}) {
    PushPiece piece = Piece(0, shard, 0, first_attempt_);
    piece.is_load = true;
    ASSERT_TRUE(Push(piece).ok());
  }
  Commit(0, 0, first_attempt_, true);
  const absl::Status failed = answers_[Commit(1, 0, first_attempt_, true)].status;
  EXPECT_TRUE(absl::IsUnavailable(failed));
  EXPECT_NE(failed.message().find("the journal cannot be written"), std::string::npos) << failed;
  EXPECT_EQ(participant_->prepared(), nullptr);
  ASSERT_TRUE(leader_->Status().serving) << leader_->Status().waiting_for;
  prepare_status_ = absl::OkStatus();
  const int64_t attempt = leader_->Status().position.attempt;  // its staged bytes are still there
  Commit(0, 0, attempt, true);
  EXPECT_TRUE(answers_[Commit(1, 0, attempt, true)].status.ok());
}

TEST_F(Job, ADamagedShardEndsWhatWaitsForItAndEveryLaterStep) {
  Load();
  hold_applies_ = true;
  PushAll(1);
  const RequestId lost = Pull(0, 1), other = Pull(1, 1);
  Commit(0, 1);
  ASSERT_TRUE(answers_[Commit(1, 1)].status.ok());
  const RequestId early = Commit(0, 2);
  const absl::Status damage = absl::DataLossError("shard 0 of 'w' cannot be read");
  Damage(0, 1, damage);
  EXPECT_EQ(participant_->damage(), damage);
  EXPECT_EQ(answers_[lost].status, damage);
  EXPECT_EQ(answers_[early].status, damage);
  EXPECT_EQ(answers_[Pull(0, 1)].status, damage);
  EXPECT_TRUE(absl::IsOutOfRange(answers_[Pull(0, 0)].status));
  EXPECT_FALSE(answers_.contains(other));
  Actions actions;
  participant_->OnShardApplied(1, 1, kNow, &actions);  // other shards go on
  Run(std::move(actions));
  EXPECT_EQ(served_, 1);
  EXPECT_EQ(Push(Piece(0, 1, 2)), damage);
  EXPECT_TRUE(absl::IsFailedPrecondition(Push(Piece(0, 1, 1))));  // the step that is committed
  EXPECT_EQ(answers_[Commit(1, 2)].status, damage);
  EXPECT_TRUE(answers_[Commit(1, 1)].status.ok());  // a repeat
  EXPECT_EQ(leader_->Status().waiting_for, damage.message());
  EXPECT_EQ(Abort(2, 1), damage);
  generation_ = answers_[Join(0, 0)].generation_issued;
  const RequestId first = Join(0, generation_);
  EXPECT_EQ(answers_[Join(1, generation_)].status, damage);
  EXPECT_EQ(answers_[first].status, damage);
}

TEST_F(Job, AStopNeverEndsWhileAShardIsDamaged) {
  Load();
  hold_applies_ = true;
  PushAll(1);
  Commit(0, 1);
  Commit(1, 1);
  Damage(0, 1, absl::DataLossError("lost"));
  Actions actions;
  participant_->OnStop(kNow, &actions);
  participant_->OnShardApplied(1, 1, kNow, &actions);
  participant_->OnTick(kNow + 5000, &actions);
  EXPECT_FALSE(participant_->stopped());
  for (const Action& action : actions) EXPECT_FALSE(std::holds_alternative<WriteFlush>(action));
}

// Flush asks the participant for a flush of its committed step, and returns what it asks for.
WriteFlush AskFor(Participant* participant, const RecoverReport::Flush& kept) {
  Actions actions;
  participant->OnMessage(0,
                         Flush{participant->epoch(), participant->position().committed_step,
                               participant->last_applied()->identity, kept},
                         kNow, &actions);
  for (const Action& action : actions)
    if (const auto* write = std::get_if<WriteFlush>(&action)) return *write;
  return {false, {}, {-1}};
}

TEST_F(Job, AFlushThatFailedIsNotWrittenByARepeatOfTheMessage) {
  Load();
  const DecisionPtr loaded = participant_->last_applied();
  const Flush message{participant_->epoch(), 0, loaded->identity, {}};
  Actions actions;
  participant_->OnMessage(0, message, kNow, &actions);
  ASSERT_TRUE(std::holds_alternative<WriteFlush>(actions.back()));
  participant_->OnFlushed(absl::ResourceExhaustedError("no space"), /*has_erased=*/false, kNow,
                          &actions);
  actions.clear();
  participant_->OnMessage(0, message, kNow, &actions);
  ASSERT_EQ(actions.size(), 1u);
  const Message& answer = std::get<Send>(actions[0]).message;
  EXPECT_TRUE(absl::IsResourceExhausted(std::get<FlushReply>(answer).status));
}

TEST_F(Job, AFlushThatFailedIsWrittenInANewEpochIfItIsAskedForAgain) {
  Load();
  const int64_t epoch = participant_->epoch();
  const auto ask = [&](const absl::Status& written) {
    Actions actions;
    leader_->OnFlush(++request_, kNow, &actions);
    Run(std::move(actions));
    Actions next;
    participant_->OnFlushed(written, /*has_erased=*/false, kNow, &next);
    Run(std::move(next));
    return answers_[request_].status;
  };
  EXPECT_TRUE(absl::IsResourceExhausted(ask(absl::ResourceExhaustedError("no space"))));
  EXPECT_EQ(participant_->epoch(), epoch);
  EXPECT_EQ(ask(absl::OkStatus()), absl::OkStatus());
  EXPECT_EQ(participant_->epoch(), epoch + 1);
  EXPECT_EQ(leader_->kept_flush().decision, participant_->last_applied()->identity);
}

TEST_F(Job, OnlyTheNewestFlushThatAllServersHaveIsNeededForTheNext) {
  Load();
  Actions actions;
  const auto step = [&] {
    const int64_t next = participant_->position().committed_step + 1;
    PushAll(next);
    Commit(0, next);
    Commit(1, next);
  };
  const auto written = [&](bool has_erased) {
    participant_->OnFlushed(absl::OkStatus(), has_erased, kNow, &actions);
    return RecoverReport::Flush{participant_->position().committed_step,
                                participant_->last_applied()->identity};
  };
  EXPECT_EQ(AskFor(participant_.get(), {}).needed, std::vector<int64_t>{});
  const RecoverReport::Flush zero = written(false);
  step();
  EXPECT_EQ(AskFor(participant_.get(), zero).needed, std::vector<int64_t>{0});
  const RecoverReport::Flush one = written(false);
  step();
  WriteFlush next = AskFor(participant_.get(), one);
  EXPECT_EQ(next.keep, std::vector<int64_t>{1});
  EXPECT_EQ(next.needed, std::vector<int64_t>{1});
  written(false);
  step();
  // Another server could not write the flush of step 2, but if it stops before it applies step 3,
  // it writes it after all.
  EXPECT_EQ(AskFor(participant_.get(), one).needed, (std::vector<int64_t>{2, 1}));
  participant_->OnFlushed(absl::ResourceExhaustedError("no space"), false, kNow, &actions);
  step();
  next = AskFor(participant_.get(), one);
  EXPECT_EQ(next.keep, (std::vector<int64_t>{2, 1}));
  EXPECT_EQ(next.needed, std::vector<int64_t>{1});
  written(/*has_erased=*/true);
  EXPECT_EQ(participant_->Image().flushes.size(), 2u);  // of steps 4 and 1
  participant_->OnStop(kNow, &actions);
  const auto& stop = std::get<WriteFlush>(actions.back());
  EXPECT_EQ(stop.needed, (std::vector<int64_t>{4, 1}));
}

TEST_F(Job, DamageEndsWithTheFlushThatReplacesTheShards) {
  Load();
  const DecisionPtr loaded = participant_->last_applied();
  Actions actions;
  participant_->OnMessage(0, Flush{participant_->epoch(), 0, loaded->identity, {}}, kNow, &actions);
  participant_->OnFlushed(absl::OkStatus(), /*has_erased=*/false, kNow, &actions);
  hold_applies_ = true;
  PushAll(1);
  Commit(0, 1);
  Commit(1, 1);
  Damage(0, 1, absl::DataLossError("lost"));
  Damage(1, 1, absl::DataLossError("lost too"));
  actions.clear();
  participant_->OnMessage(0, Restore{participant_->epoch(), 0, Digest{1, 2}}, kNow, &actions);
  EXPECT_FALSE(std::get<RestoreReply>(std::get<Send>(actions.back()).message).status.ok());
  EXPECT_FALSE(participant_->damage().ok());  // a flush that is not there changes nothing
  actions.clear();
  participant_->OnMessage(0, Restore{participant_->epoch(), 0, loaded->identity}, kNow, &actions);
  ASSERT_FALSE(actions.empty());
  EXPECT_TRUE(std::holds_alternative<LoadFlush>(actions.back()));  // the shards are not at step 0
  participant_->OnShardDamaged(1, 1, absl::DataLossError("late"), kNow, &actions);
  participant_->OnFlushRestored(loaded->identity, loaded, absl::OkStatus(), kNow, &actions);
  EXPECT_TRUE(participant_->damage().ok());
  Pull(0, 0);
  EXPECT_EQ(served_, 0);
}

TEST_F(Job, ALayoutWithoutRoomIsAJoinsAnswerAndIsAskedForAgain) {
  layout_status_ = absl::ResourceExhaustedError("4 GiB are needed");
  generation_ = answers_[Join(0, 0)].generation_issued;
  const RequestId first = Join(0, generation_);
  const RequestId second = Join(1, generation_);
  EXPECT_EQ(answers_[first].status, layout_status_);
  EXPECT_EQ(answers_[second].status, layout_status_);
  EXPECT_EQ(Push(Piece(0, 0, 0, 2)), layout_status_);
  const RequestId again = Join(0, generation_);
  EXPECT_FALSE(answers_.contains(again));  // until the leader has asked again
  layout_status_ = absl::OkStatus();
  Actions actions;
  leader_->OnTick(kNow + 1000, &actions);
  Run(std::move(actions));
  ASSERT_TRUE(answers_[again].status.ok()) << answers_[again].status;
  PushPiece piece = Piece(0, 0, 0, answers_[again].position.attempt);
  piece.is_load = true;
  EXPECT_TRUE(Push(piece).ok());
}

TEST_F(Job, WhileRoomIsMadePushesAreEarlyAndOpenIsAnsweredOnce) {
  hold_layouts_ = true;
  generation_ = answers_[Join(0, 0)].generation_issued;
  Join(0, generation_);
  const RequestId join = Join(1, generation_);
  EXPECT_EQ(layouts_asked_, 1);
  Actions actions;
  leader_->OnTick(kNow + 1000, &actions);  // repeats OpenJob
  Run(std::move(actions));
  EXPECT_EQ(layouts_asked_, 1);
  EXPECT_FALSE(answers_.contains(join));
  const KeyVerdict verdict = participant_->CheckKey({0, generation_, 0, 2});
  EXPECT_TRUE(verdict.is_later);
  EXPECT_TRUE(absl::IsUnavailable(verdict.status)) << verdict.status;
  Actions taken;
  participant_->OnLayoutTaken({77, 77}, absl::OkStatus(), kNow, &taken);  // was never requested
  Run(std::move(taken));
  EXPECT_FALSE(answers_.contains(join));
  const auto layout = std::make_shared<Layout>();
  layout->by_rank = {Contributions(0), Contributions(1)};
  Actions wanted;
  participant_->OnLayoutTaken(DigestLayout(layout->by_rank), absl::OkStatus(), kNow, &wanted);
  Run(std::move(wanted));
  EXPECT_TRUE(answers_[join].status.ok());
}

TEST_F(Job, TheRoomOfALayoutIsGoneWhileRoomForAnotherIsMade) {
  Load();
  const auto open = [&](int64_t generation, std::vector<std::vector<Contribution>> by_rank) {
    auto layout = std::make_shared<Layout>();
    layout->digest = DigestLayout(by_rank);
    layout->by_rank = std::move(by_rank);
    auto placement = std::make_shared<Placement>(Placement{{{0, 7}}, {{0, 7}}});
    Actions actions;
    participant_->OnMessage(
        0,
        OpenJob{participant_->epoch(), generation, 0, 1, spec_->manifest_digest, layout, placement},
        kNow, &actions);
    Run(std::move(actions));
  };
  hold_layouts_ = true;
  const std::vector<Contribution> alone = {{0, Mode::kExactlyOnce, {FlatBox(0, 4)}},
                                           {1, Mode::kSum, {FlatBox(0, 2)}}};
  open(8, {alone});
  open(9, {Contributions(0), Contributions(1)});  // as before generation 8
  EXPECT_TRUE(participant_->CheckKey({0, 9, 1, 1}).is_later);
  hold_layouts_ = false;
  Actions actions;
  participant_->OnLayoutTaken(DigestLayout({alone}), absl::OkStatus(), kNow, &actions);
  Run(std::move(actions));
  EXPECT_EQ(layouts_asked_, 3);
  EXPECT_TRUE(participant_->CheckKey({0, 9, 1, 1}).status.ok());
}

TEST_F(Job, ARecoveryOpensWithoutRoomAndANewAttemptAsksForItAgain) {
  Load();
  layout_status_ = absl::ResourceExhaustedError("4 GiB are needed");
  ParticipantImage image = participant_->Image();
  image.layout = {};  // as after a crash that kept the state
  participant_ = std::make_unique<Participant>(spec_, 0, 0, image, 7, ParticipantOptions{});
  Actions actions;
  participant_->OnTick(kNow, &actions);
  Run(std::move(actions));
  ASSERT_TRUE(leader_->Status().serving) << leader_->Status().waiting_for;
  Pull(0, 0);
  EXPECT_EQ(served_, 0);
  const int64_t attempt = leader_->Status().position.attempt;
  EXPECT_EQ(Push(Piece(0, 0, 1, attempt)), layout_status_);
  EXPECT_EQ(Abort(1, attempt), layout_status_);
  layout_status_ = absl::OkStatus();
  EXPECT_TRUE(Abort(1, attempt + 1).ok());
  EXPECT_TRUE(Push(Piece(0, 0, 1, attempt + 2)).ok());
}

TEST_F(Job, AbortOpensTheNextAttemptAndIsRefusedOnceDecided) {
  Load();
  const RequestId waiting = Commit(0, 1);
  ASSERT_TRUE(Abort(1, 1).ok());
  EXPECT_TRUE(absl::IsAborted(answers_[waiting].status));
  EXPECT_EQ(answers_[waiting].position.attempt, 2);
  EXPECT_TRUE(Abort(1, 1).ok());  // already over
  EXPECT_EQ(leader_->Status().position.attempt, 2);
  PushAll(1, 2);
  Commit(0, 1, 2);
  Commit(1, 1, 2);
  EXPECT_TRUE(absl::IsFailedPrecondition(Abort(1, 2)));
}

TEST_F(Job, ACommitOfALaterAttemptIsAbortedAndOfALaterGenerationRefused) {
  Load();
  const Answer later = answers_[Commit(0, 1, 2)];
  EXPECT_TRUE(absl::IsAborted(later.status)) << later.status;
  EXPECT_EQ(later.position.attempt, 1);
  ++generation_;
  EXPECT_TRUE(absl::IsFailedPrecondition(answers_[Commit(0, 1)].status));
}

TEST_F(Job, WhileAStepIsDecidedOnlyItsOwnAttemptIsTooLateToAbort) {
  Load();
  ASSERT_TRUE(Abort(1, 1).ok());
  PushAll(1, 2);
  hold_prepares_ = true;
  Commit(0, 1, 2);
  Commit(1, 1, 2);
  EXPECT_TRUE(absl::IsFailedPrecondition(Abort(1, 2)));
  EXPECT_TRUE(Abort(1, 1).ok());  // already over
  EXPECT_TRUE(absl::IsFailedPrecondition(Abort(2, 1)));
}

TEST_F(Job, ARefusedCommitTellsWhy) {
  Form();
  EXPECT_EQ(ReasonOf(answers_[Commit(0, 0, first_attempt_)].status), Reason::kLoading);
  EXPECT_EQ(ReasonOf(answers_[Commit(0, 3, first_attempt_)].status), Reason::kLoading);
  Load();
  EXPECT_EQ(ReasonOf(answers_[Commit(0, 2)].status), Reason::kWrongStep);
  EXPECT_EQ(ReasonOf(answers_[Commit(0, 1, 2)].status), Reason::kStaleAttempt);
  Commit(0, 1);
  EXPECT_EQ(ReasonOf(answers_[Commit(1, 1, 1, false, {}, 5)].status), Reason::kHyperParameters);
  ++generation_;
  EXPECT_EQ(ReasonOf(answers_[Commit(0, 1)].status), Reason::kStaleGeneration);
}

TEST_F(Job, ACommitThatWaitsWhenItsGenerationEndsIsOfAStaleGeneration) {
  Load();
  const RequestId waiting = Commit(0, 1);
  Form();
  EXPECT_TRUE(absl::IsAborted(answers_[waiting].status)) << answers_[waiting].status;
  EXPECT_EQ(ReasonOf(answers_[waiting].status), Reason::kStaleGeneration);
  --generation_;
  const Answer late = answers_[Commit(0, 1)];
  EXPECT_EQ(late.status, answers_[waiting].status);
}

TEST_F(Job, AnAbortIsRefusedAsDecidedStaleOrOfAnotherStep) {
  Load();
  ASSERT_TRUE(Abort(1, 1).ok());
  PushAll(1, 2);
  hold_prepares_ = true;
  Commit(0, 1, 2);
  Commit(1, 1, 2);  // step 0 is committed, attempt 2 of step 1 is decided
  EXPECT_EQ(ReasonOf(Abort(1, 2)), Reason::kDecided);
  EXPECT_EQ(ReasonOf(Abort(0, 1)), Reason::kDecided);
  EXPECT_EQ(ReasonOf(Abort(1, 3)), Reason::kWrongStep);
  EXPECT_EQ(ReasonOf(Abort(2, 1)), Reason::kWrongStep);
  EXPECT_EQ(ReasonOf(Abort(-1, 1)), Reason::kWrongStep);
  ++generation_;
  EXPECT_EQ(ReasonOf(Abort(1, 2)), Reason::kStaleGeneration);
  EXPECT_EQ(ReasonOf(Abort(0, 1)), Reason::kStaleGeneration);
}

TEST_F(Job, AKeyIsOpenLaterOrRefusedWithAReason) {
  Load();
  Form();
  Actions restart;
  leader_->OnMessage(0, Register{7, 1}, kNow, &restart);
  Run(std::move(restart));
  while (leader_->Status().position.attempt < 2) {
    ASSERT_TRUE(Abort(1, leader_->Status().position.attempt).ok());
  }
  ASSERT_EQ(leader_->Status().position.attempt, 2);  // of step 1, generation 2, epoch 2
  const auto check = [&](const AttemptKey& key) { return participant_->CheckKey(key); };
  const int64_t epoch = participant_->epoch();
  const auto reason = [&](const AttemptKey& key) {
    const KeyVerdict verdict = check(key);
    EXPECT_FALSE(verdict.is_later) << verdict.status;
    return ReasonOf(verdict.status);
  };
  const auto later = [&](const AttemptKey& key) {
    const KeyVerdict verdict = check(key);
    EXPECT_TRUE(verdict.is_later) << verdict.status;
    return verdict.status;
  };
  EXPECT_TRUE(check({epoch, generation_, 1, 2}).status.ok());
  EXPECT_TRUE(check({0, 0, 1, 0}).status.ok());  // a query names neither
  EXPECT_EQ(reason({epoch - 1, generation_, 1, 2}), Reason::kStaleEpoch);
  EXPECT_EQ(reason({epoch, generation_ - 1, 1, 2}), Reason::kStaleGeneration);
  EXPECT_EQ(reason({epoch, generation_, 1, 1}), Reason::kStaleAttempt);
  EXPECT_EQ(reason({epoch, generation_, 0, 2}), Reason::kWrongStep);
  EXPECT_EQ(reason({epoch, generation_, 2, 1}), Reason::kWrongStep);
  EXPECT_TRUE(absl::IsUnavailable(check({epoch + 1, generation_, 1, 2}).status));
  EXPECT_EQ(ReasonOf(later({epoch, generation_, 1, 3})), Reason::kStaleAttempt);
  EXPECT_EQ(ReasonOf(later({epoch, generation_ + 1, 1, 1})), Reason::kStaleGeneration);
  hold_applies_ = true;
  PushAll(1, 2);
  Commit(0, 1, 2);
  ASSERT_TRUE(answers_[Commit(1, 1, 2)].status.ok());
  EXPECT_TRUE(absl::IsUnavailable(later({epoch, generation_, 2, 1})));  // step 1 is being applied
}

TEST_F(Job, PullsServeExactVersions) {
  Load();
  Pull(0, 0);
  EXPECT_EQ(served_, 0);
  Actions actions;
  participant_->OnPullDone(request_, kNow, &actions);
  const RequestId next = Pull(0, 1);
  EXPECT_FALSE(answers_.contains(next));  // waits
  EXPECT_TRUE(absl::IsFailedPrecondition(answers_[Pull(0, 2)].status));
  Pull(1, 1);
  PushAll(1);
  Commit(0, 1);
  served_ = -2;
  Commit(1, 1);
  EXPECT_EQ(served_, 1);
  EXPECT_TRUE(absl::IsOutOfRange(answers_[Pull(0, 0)].status));
}

TEST_F(Job, PullsOfTheFirstVersionWaitUntilACommittedLoadIsApplied) {
  hold_applies_ = true;
  Load();
  const RequestId pull = Pull(0, 0);
  EXPECT_FALSE(answers_.contains(pull));  // waits
  Actions actions;
  participant_->OnShardApplied(0, 0, kNow, &actions);
  Run(std::move(actions));
  EXPECT_EQ(served_, 0);
}

TEST_F(Job, AnAbortedAttemptEndsThePullsThatWaitForIt) {
  Load();
  const RequestId pull = Pull(0, 1);
  ASSERT_TRUE(Abort(1, 1).ok());
  EXPECT_TRUE(absl::IsAborted(answers_[pull].status));
}

TEST_F(Job, HoldDelaysTheApplyAndNotTheCommit) {
  Load();
  Actions actions;
  leader_->OnHold(++request_, "export", 0, kNow + 5000, kNow, &actions);
  Run(std::move(actions));
  EXPECT_TRUE(answers_[request_].status.ok());
  PushAll(1);
  Commit(0, 1);
  EXPECT_TRUE(answers_[Commit(1, 1)].status.ok());
  Pull(0, 0);
  EXPECT_EQ(served_, 0);
  Actions later;
  leader_->OnTick(kNow + 6000, &later);
  participant_->OnTick(kNow + 6000, &later);
  Run(std::move(later));
  Actions pins;
  participant_->OnTick(kNow + 6000, &pins);
  Run(std::move(pins));
  EXPECT_TRUE(absl::IsOutOfRange(answers_[Pull(0, 0)].status));
}

TEST_F(Job, StatusTellsWhatEveryShardHasApplied) {
  EXPECT_EQ(leader_->Status().applied_step, kLoading);
  Load();
  EXPECT_EQ(leader_->Status().applied_step, 0);
  hold_applies_ = true;
  PushAll(1);
  Commit(0, 1);
  EXPECT_TRUE(answers_[Commit(1, 1)].status.ok());
  for (ShardId shard : {0, 1}) {
    EXPECT_EQ(leader_->Status().position.committed_step, 1);
    EXPECT_EQ(leader_->Status().applied_step, 0) << "before shard " << shard;
    Actions actions;
    participant_->OnShardApplied(shard, 1, kNow, &actions);
    Run(std::move(actions));
  }
  EXPECT_EQ(leader_->Status().applied_step, 1);
}

TEST_F(Job, TheApplyWaitsForTheHoldOfEveryHolder) {
  Load();
  const auto hold = [&](const std::string& holder, int64_t step, int64_t until_ms) {
    Actions actions;
    leader_->OnHold(++request_, holder, step, until_ms, kNow, &actions);
    Run(std::move(actions));
    return answers_[request_].status;
  };
  EXPECT_TRUE(hold("first", 0, kNow + 5000).ok());
  EXPECT_TRUE(hold("second", 0, kNow + 5000).ok());
  PushAll(1);
  Commit(0, 1);
  EXPECT_TRUE(answers_[Commit(1, 1)].status.ok());
  EXPECT_TRUE(hold("first", 0, kNow).ok());  // released
  Pull(0, 0);
  EXPECT_EQ(served_, 0);
  EXPECT_TRUE(hold("third", 0, kNow + 5000).ok());  // the version is still there
  EXPECT_TRUE(hold("third", 0, kNow).ok());
  EXPECT_TRUE(hold("second", 0, kNow).ok());
  EXPECT_TRUE(absl::IsOutOfRange(hold("first", 0, kNow + 5000)));
}

TEST_F(Job, AWorkerThatHasSeenMoreIsToldOfTheLossUntilAnOperatorAccepts) {
  Load();
  EXPECT_TRUE(absl::IsDataLoss(answers_[Join(0, generation_, 5)].status));
  Actions actions;
  leader_->OnAcceptRollback(++request_, 0, kNow, &actions);
  Run(std::move(actions));
  EXPECT_TRUE(answers_[request_].status.ok());
  EXPECT_TRUE(answers_[Join(0, generation_, 5)].status.ok());
}

TEST_F(Job, RollbackOfAHealthyJobIsRefused) {
  Load();
  Actions actions;
  leader_->OnAcceptRollback(++request_, 0, kNow, &actions);
  Run(std::move(actions));
  EXPECT_TRUE(absl::IsFailedPrecondition(answers_[request_].status));
}

// A shard with copies on two servers, of which server 0 leads; nothing is lost.
class TwoCopies : public ::testing::Test {
 protected:
  TwoCopies() {
    spec_ = std::make_shared<JobSpec>();
    spec_->manifest_digest = {1, 2};
    spec_->level = Level::kReplicated;
    spec_->server_count = 2;
    spec_->tensors = {{"w", {4}, true}};
    spec_->shards = {{0, {0, 4}, {0, 1}}};
    leader_ = std::make_unique<Leader>(
        spec_, 0, JobRecord{},
        [](const ScalarInputs&) -> absl::StatusOr<std::string> { return std::string(); },
        LeaderOptions{});
    for (ServerId server : {0, 1}) Start(server, 7 + server);
    Tick(0);
  }

  void Start(ServerId server, int64_t incarnation, int64_t previous_incarnation = 0) {
    ParticipantImage image;
    image.incarnation = previous_incarnation;
    image.epoch = leader_->Status().position.epoch;
    participants_[server] =
        std::make_unique<Participant>(spec_, server, 0, image, incarnation, ParticipantOptions{});
  }

  void Tick(int64_t by_ms) {
    now_ms_ += by_ms;
    Actions actions;
    leader_->OnTick(now_ms_, &actions);
    Run(0, std::move(actions));
    for (ServerId server : {0, 1}) {
      Actions own;
      participants_[server]->OnTick(now_ms_, &own);
      Run(server, std::move(own));
    }
  }

  void Run(ServerId server, Actions actions) {
    std::deque<std::pair<ServerId, Action>> queue;
    for (Action& action : actions) queue.emplace_back(server, std::move(action));
    while (!queue.empty()) {
      auto [at, action] = std::move(queue.front());
      queue.pop_front();
      Actions next;
      ServerId to = at;
      if (auto* send = std::get_if<Send>(&action)) {
        to = send->to;
        if (ForLeader(send->message)) {
          leader_->OnMessage(at, send->message, now_ms_, &next);
        } else {
          participants_[to]->OnMessage(at, send->message, now_ms_, &next);
        }
      } else if (auto* answer = std::get_if<Answer>(&action)) {
        answers_[answer->request] = *answer;
      } else if (auto* record = std::get_if<PersistRecord>(&action)) {
        leader_->OnRecordPersisted(record->record.version, true, now_ms_, &next);
      } else if (auto* epoch = std::get_if<PersistEpoch>(&action)) {
        participants_[at]->OnEpochDurable(epoch->epoch, now_ms_, &next);
      } else if (auto* apply = std::get_if<StartApply>(&action)) {
        participants_[at]->OnShardApplied(apply->shard, apply->decision->step, now_ms_, &next);
      } else if (auto* take = std::get_if<TakeLayout>(&action)) {
        participants_[at]->OnLayoutTaken(take->layout->digest, absl::OkStatus(), now_ms_, &next);
      } else if (auto* stage = std::get_if<StageShard>(&action)) {
        participants_[at]->OnShardStaged(stage->step, stage->attempt, {stage->shard, {9, 9}},
                                         now_ms_, &next);
      } else if (auto* forward = std::get_if<ForwardBytes>(&action)) {
        bool keep = false;
        to = forward->to;
        participants_[to]->OnForward(at, forward->forward, true, now_ms_, &keep, &next);
      } else if (auto* fetch = std::get_if<FetchShard>(&action)) {
        participants_[at]->OnShardFetched(fetch->shard, fetch->decision->identity, absl::OkStatus(),
                                          now_ms_, &next);
      }
      for (Action& more : next) queue.emplace_back(to, std::move(more));
    }
  }

  Answer Join(int64_t generation) {
    Actions actions;
    leader_->OnJoin(++request_,
                    {0, 1, generation, {{0, Mode::kExactlyOnce, {FlatBox(0, 4)}}}, kLoading},
                    now_ms_, &actions);
    Run(0, std::move(actions));
    return answers_[request_];
  }

  // Commits a LOAD. The first one sets the shard, later ones set nothing.
  absl::Status CommitLoad() {
    const Position position = leader_->Status().position;
    Actions actions;
    if (position.committed_step == kLoading) {
      PushPiece piece;
      piece.key = {position.generation, 0, position.attempt, 0, 0, 1};
      piece.is_load = true;
      bool keep = false;
      participants_[0]->OnPush(++request_, piece, true, now_ms_, &keep, &actions);
      Run(0, std::exchange(actions, {}));
    }
    CommitRequest commit;
    commit.generation = position.generation;
    commit.step = position.committed_step + 1;
    commit.attempt = position.attempt;
    commit.is_load = true;
    leader_->OnCommitStep(++request_, commit, now_ms_, &actions);
    Run(0, std::move(actions));
    return answers_.contains(request_) ? answers_[request_].status
                                       : absl::UnavailableError("no answer");
  }

  absl::Status Hold(int64_t step, int64_t for_ms) {
    Actions actions;
    leader_->OnHold(++request_, "export", step, now_ms_ + for_ms, now_ms_, &actions);
    Run(0, std::move(actions));
    return answers_[request_].status;
  }

  int64_t AppliedBy(ServerId server) {
    int64_t step = -2;
    Digest decision;
    EXPECT_TRUE(participants_[server]->AppliedOf(0, &step, &decision).ok());
    return step;
  }

  std::shared_ptr<JobSpec> spec_;
  std::unique_ptr<Leader> leader_;
  std::unique_ptr<Participant> participants_[2];
  std::map<RequestId, Answer> answers_;
  RequestId request_ = 0;
  int64_t now_ms_ = kNow;
};

TEST_F(TwoCopies, AHoldLongerThanTheTimeoutOfACopyLeavesNoneOut) {
  ASSERT_TRUE(Join(Join(0).generation_issued).status.ok());
  ASSERT_TRUE(CommitLoad().ok());
  ASSERT_TRUE(Hold(0, 30'000).ok());
  ASSERT_TRUE(CommitLoad().ok());
  const int64_t epoch = leader_->Status().position.epoch;
  for (int second = 0; second < 29; ++second) Tick(1000);
  EXPECT_EQ(leader_->Status().position.epoch, epoch);
  EXPECT_EQ(AppliedBy(0), 0);
  EXPECT_EQ(AppliedBy(1), 0);
  for (int second = 0; second < 3; ++second) Tick(1000);
  EXPECT_EQ(leader_->Status().position.epoch, epoch);
  EXPECT_EQ(AppliedBy(0), 1);
  EXPECT_EQ(AppliedBy(1), 1);
}

TEST_F(TwoCopies, ARecoveryEndsTheHoldOfAVersionThatIsAppliedOver) {
  ASSERT_TRUE(Join(Join(0).generation_issued).status.ok());
  ASSERT_TRUE(CommitLoad().ok());
  ASSERT_TRUE(Hold(0, 30'000).ok());
  ASSERT_TRUE(CommitLoad().ok());
  Start(1, 90);
  for (int second = 0; second < 3; ++second) Tick(1000);
  ASSERT_TRUE(leader_->Status().serving) << leader_->Status().waiting_for;
  EXPECT_EQ(AppliedBy(0), 1);
  EXPECT_TRUE(absl::IsOutOfRange(Hold(0, 30'000)));
}

TEST_F(TwoCopies, AJobThatLosesEveryCopyBeforeAnybodyJoinsCanStillBeLoaded) {
  Join(0);
  for (ServerId server : {0, 1}) Start(server, 90 + server);
  for (int second = 0; second < 3; ++second) Tick(1000);
  ASSERT_TRUE(leader_->Status().serving) << leader_->Status().waiting_for;
  ASSERT_TRUE(Join(Join(0).generation_issued).status.ok());
  EXPECT_TRUE(CommitLoad().ok());
}

TEST_F(TwoCopies, AJobThatLosesEveryCopyOfAShardOnceItMayBeLoadedIsStuck) {
  ASSERT_TRUE(Join(Join(0).generation_issued).status.ok());
  for (ServerId server : {0, 1}) Start(server, 90 + server);
  for (int second = 0; second < 3; ++second) Tick(1000);
  EXPECT_FALSE(leader_->Status().serving);
  EXPECT_TRUE(leader_->Status().is_stuck);
}

TEST_F(TwoCopies, OneServerThatLostItsMemoryIsEnoughForAJobThatIsStuck) {
  ASSERT_TRUE(Join(Join(0).generation_issued).status.ok());
  EXPECT_FALSE(leader_->Status().has_lost_memory);
  Start(0, 90, /*previous_incarnation=*/7);
  Start(1, 91);
  Tick(1000);
  EXPECT_TRUE(leader_->Status().is_stuck);
  EXPECT_TRUE(leader_->Status().has_lost_memory);
}

TEST_F(TwoCopies, AServerThatLostItsMemoryStopsWithoutAFlush) {
  ASSERT_TRUE(Join(Join(0).generation_issued).status.ok());
  ASSERT_TRUE(CommitLoad().ok());
  Start(1, 90, /*previous_incarnation=*/8);
  Actions actions;
  participants_[1]->OnStop(now_ms_, &actions);
  EXPECT_TRUE(participants_[1]->stopped());
  Start(1, 91, /*previous_incarnation=*/8);
  for (int second = 0; second < 3; ++second) Tick(1000);  // it catches up and holds the job again
  ASSERT_EQ(AppliedBy(1), 0);
  participants_[1]->OnStop(now_ms_, &actions);
  EXPECT_FALSE(participants_[1]->stopped());
  EXPECT_TRUE(std::holds_alternative<WriteFlush>(actions.back()));
}

TEST(ReplayJournal, TheLastPreparedRecordIsNotKnownToBeCommitted) {
  const auto decide = [](int64_t step) {
    auto decision = std::make_shared<DecisionRecord>();
    decision->step = step;
    decision->attempt = 1;
    decision->identity = Identify(*decision);
    return decision;
  };
  using Type = JournalRecord::Type;
  const DecisionPtr one = decide(1), two = decide(2);
  JournalReplay replay = ReplayJournal({{Type::kPrepared, one}, {Type::kPrepared, two}}, 0);
  EXPECT_EQ(replay.applied, std::vector<DecisionPtr>{one});
  EXPECT_EQ(replay.prepared, two);
  replay = ReplayJournal({{Type::kPrepared, one}, {Type::kDiscarded, nullptr, 1, 1}}, 0);
  EXPECT_TRUE(replay.applied.empty());
  EXPECT_EQ(replay.prepared, nullptr);
  replay = ReplayJournal({{Type::kPrepared, one}, {Type::kApplied, one}}, 0);
  EXPECT_EQ(replay.applied, std::vector<DecisionPtr>{one});
  EXPECT_EQ(replay.prepared, nullptr);
}

}  // namespace
}  // namespace orlop::step
