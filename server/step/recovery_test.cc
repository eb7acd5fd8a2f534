#include "server/step/recovery.h"

#include <cstdint>
#include <memory>
#include <optional>

#include "gtest/gtest.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/messages.h"

namespace orlop::step {
namespace {

// Two shards, of one tensor, each with copies on servers 0 and 1.
JobSpec TwoShards() {
  JobSpec spec;
  spec.server_count = 2;
  spec.tensors = {{"w", {4}, true}};
  spec.shards = {{0, {0, 2}, {0, 1}}, {0, {2, 4}, {1, 0}}};
  return spec;
}

DecisionPtr Decide(int64_t step, int64_t attempt, const DecisionPtr& previous) {
  auto decision = std::make_shared<DecisionRecord>();
  decision->generation = 1;
  decision->step = step;
  decision->attempt = attempt;
  if (previous != nullptr) decision->previous = previous->identity;
  decision->identity = Identify(*decision);
  return decision;
}

RecoverReport Report(int64_t incarnation, const DecisionPtr& applied, const DecisionPtr& prepared) {
  RecoverReport report;
  report.incarnation = incarnation;
  report.last_applied = applied;
  report.prepared = prepared;
  for (ShardId shard = 0; shard < 2; ++shard) {
    report.shards.push_back({shard, applied->step, applied->identity});
  }
  return report;
}

const Placement kBoth = {{{0, 10}, {1, 11}}, {{1, 11}, {0, 10}}};
const Placement kApart = {{{0, 10}}, {{1, 11}}};

TEST(Recovery, FindsAStepThatEveryShardHasPrepared) {
  const DecisionPtr old = Decide(4, 1, nullptr), next = Decide(5, 1, old);
  const Verdict verdict =
      Resolve(TwoShards(), kApart, {Report(10, old, next), Report(11, old, next)});
  ASSERT_EQ(verdict.outcome, Verdict::Outcome::kFound);
  EXPECT_EQ(verdict.step, 5);
  EXPECT_EQ(verdict.decision, next);
}

TEST(Recovery, AppliedSomewhereAndPreparedElsewhereIsCommitted) {
  const DecisionPtr old = Decide(4, 1, nullptr), next = Decide(5, 1, old);
  const Verdict verdict =
      Resolve(TwoShards(), kApart, {Report(10, next, nullptr), Report(11, old, next)});
  EXPECT_EQ(verdict.outcome, Verdict::Outcome::kFound);
  EXPECT_EQ(verdict.step, 5);
}

TEST(Recovery, KeepsTheOldStepWhenAShardHasNotPrepared) {
  const DecisionPtr old = Decide(4, 1, nullptr), next = Decide(5, 1, old);
  const Verdict verdict =
      Resolve(TwoShards(), kApart, {Report(10, old, next), Report(11, old, nullptr)});
  EXPECT_EQ(verdict.outcome, Verdict::Outcome::kFound);
  EXPECT_EQ(verdict.step, 4);
}

TEST(Recovery, EqualNumbersUnderOtherDecisionsAreNotOneStep) {
  const DecisionPtr old = Decide(4, 1, nullptr);
  const DecisionPtr first = Decide(5, 1, old), second = Decide(5, 2, old);
  const Verdict verdict =
      Resolve(TwoShards(), kApart, {Report(10, old, first), Report(11, old, second)});
  EXPECT_EQ(verdict.outcome, Verdict::Outcome::kFound);
  EXPECT_EQ(verdict.step, 4);
}

TEST(Recovery, ALostStepIsDamageAndNeverAMixture) {
  const DecisionPtr old = Decide(4, 1, nullptr), next = Decide(5, 1, old);
  const Verdict verdict =
      Resolve(TwoShards(), kApart, {Report(10, next, nullptr), Report(11, old, nullptr)});
  EXPECT_EQ(verdict.outcome, Verdict::Outcome::kDamaged);
}

TEST(Recovery, AnotherIncarnationDoesNotVote) {
  const DecisionPtr old = Decide(4, 1, nullptr);
  const Verdict waiting =
      Resolve(TwoShards(), kApart, {Report(10, old, nullptr), Report(99, old, nullptr)});
  EXPECT_EQ(waiting.outcome, Verdict::Outcome::kNoVoter);
  EXPECT_NE(waiting.reason.find("shard 1 of tensor w"), std::string::npos) << waiting.reason;
  const Verdict replicated =
      Resolve(TwoShards(), kBoth, {Report(10, old, nullptr), Report(99, old, nullptr)});
  EXPECT_EQ(replicated.outcome, Verdict::Outcome::kFound);
  EXPECT_EQ(replicated.in_sync, (Placement{{{0, 10}}, {{0, 10}}}));
}

TEST(Recovery, ACopyThatCannotCarryTheStepOnLeavesTheList) {
  const DecisionPtr old = Decide(4, 1, nullptr), next = Decide(5, 1, old);
  Reports reports = {Report(10, old, next), Report(11, old, nullptr)};
  EXPECT_EQ(Resolve(TwoShards(), kBoth, reports).in_sync, (Placement{{{0, 10}}, {{0, 10}}}));
  reports[1]->is_staged = true;  // in the decision's attempt, so it can prepare again
  reports[1]->generation = 1;
  reports[1]->staged_step = 5;
  reports[1]->staged_attempt = 1;
  EXPECT_EQ(Resolve(TwoShards(), kBoth, reports).in_sync, kBoth);
}

RecoverReport Empty(int64_t incarnation) {
  RecoverReport report;
  report.incarnation = incarnation;
  report.shards = {{0, kLoading, {}}, {1, kLoading, {}}};
  return report;
}

TEST(Recovery, AnInSyncCopyThatHoldsNothingShowsThatNothingWasCommitted) {
  const DecisionPtr load = Decide(0, 1, nullptr);
  JobRecord record;
  record.in_sync = kApart;
  record.formed = 1;
  EXPECT_TRUE(IsStillLoading(record, {Empty(10), Empty(99)}));
  EXPECT_FALSE(IsStillLoading(record, {Empty(98), Empty(99)})) << "nobody knows";
  EXPECT_FALSE(IsStillLoading(record, {Empty(10), std::nullopt}));
  RecoverReport prepared = Empty(10);
  prepared.prepared = load;
  EXPECT_FALSE(IsStillLoading(record, {prepared, Empty(99)})) << "the other one may have too";
  EXPECT_FALSE(IsStillLoading(record, {Report(10, load, nullptr), Empty(99)}));
  RecoverReport flushed = Empty(99);
  flushed.flushes = {{0, load->identity}};
  EXPECT_FALSE(IsStillLoading(record, {Empty(10), flushed}));
  record.formed = 0;  // no worker has ever been let in
  EXPECT_TRUE(IsStillLoading(record, {Empty(98), Empty(99)}));
}

TEST(Recovery, OffersOnlyFlushesOfOneDecisionThatCoverEveryShard) {
  const DecisionPtr three = Decide(3, 1, nullptr), five = Decide(5, 1, three);
  const DecisionPtr other_five = Decide(5, 2, three);
  RecoverReport a = Report(20, three, nullptr), b = Report(21, three, nullptr);
  for (RecoverReport* report : {&a, &b}) {
    report->last_applied = nullptr;
    for (ShardReport& shard : report->shards) shard = {shard.shard, kLoading, {}};
  }
  a.flushes = {{3, three->identity}, {5, five->identity}};
  b.flushes = {{3, three->identity}, {5, other_five->identity}};
  JobSpec spec = TwoShards();
  spec.shards[0].copies = {0};
  spec.shards[1].copies = {1};
  const auto offers = RollbackOffers(spec, {a, b});
  ASSERT_EQ(offers.size(), 1u);
  EXPECT_EQ(offers[0].step, 3);
}

TEST(Recovery, NamesTheNewestFlushThatEveryShardHas) {
  const DecisionPtr one = Decide(1, 1, nullptr), three = Decide(3, 1, one);
  const DecisionPtr nine = Decide(9, 1, three);
  RecoverReport a = Empty(20), b = Empty(21);
  a.flushes = {{9, nine->identity}, {3, three->identity}, {1, one->identity}};
  b.flushes = {{3, three->identity}, {1, one->identity}};
  JobSpec spec = TwoShards();
  spec.shards[0].copies = {0};
  spec.shards[1].copies = {1};
  EXPECT_EQ(NewestCommonFlush(spec, {a, b}, 10).decision, three->identity);
  EXPECT_EQ(NewestCommonFlush(spec, {a, b}, 2).decision, one->identity) << "of another history";
  EXPECT_TRUE(NewestCommonFlush(spec, {a, b}, 0).decision.empty());
  EXPECT_TRUE(NewestCommonFlush(spec, {a, std::nullopt}, 10).decision.empty());
  EXPECT_EQ(NewestCommonFlush(TwoShards(), {a, b}, 10).decision, nine->identity)
      << "of each shard one copy is enough";
}

}  // namespace
}  // namespace orlop::step
