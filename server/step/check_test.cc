#include "server/step/check.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "base/box.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/step/job.h"
#include "server/step/layout.h"
#include "server/step/messages.h"
#include "server/step/participant.h"

namespace orlop::step {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kEpoch = 7;

// Two shards of one tensor on servers 0 and 1, and one of another tensor on server 1.
JobSpec ThreeShards() {
  JobSpec spec;
  spec.server_count = 2;
  spec.tensors = {{"w", {4}, true}, {"v", {2, 2}, true}};
  spec.shards = {{0, {0, 2}, {0}}, {0, {2, 4}, {1}}, {1, {0, 4}, {1}}};
  return spec;
}

// Returns the text of the refusal of a message from server 1 to server 0; empty: it is accepted.
std::string Refusal(const Message& message, ServerId from = 1) {
  const absl::Status status = CheckMessage(ThreeShards(), 0, from, kEpoch, message);
  EXPECT_TRUE(status.ok() || absl::IsInvalidArgument(status)) << status;
  return std::string(status.message());
}

DecisionRecord Whole() {
  DecisionRecord decision;
  decision.step = 3;
  decision.applied_count = {3, 3};
  decision.untouched = {0, 0};
  decision.identity = Identify(decision);
  return decision;
}

Message Prepares(const DecisionRecord& decision) {
  return Prepare{kEpoch, std::make_shared<DecisionRecord>(decision)};
}

StageReport Staged(ShardId shard) {
  StageReport report;
  report.epoch = kEpoch;
  report.shards.push_back({.shard = shard});
  return report;
}

TEST(Check, SendersAreOtherServersOfTheCluster) {
  EXPECT_EQ(Refusal(Register{1, kEpoch}), "");
  for (const ServerId from : {0, 2, -1, INT32_MAX})
    EXPECT_THAT(Refusal(Register{1, kEpoch}, from), HasSubstr("sender")) << from;
}

TEST(Check, EpochsRiseByABoundedStep) {
  EXPECT_EQ(Refusal(Recover{kEpoch + kMaxEpochRise, {}}), "");
  for (const int64_t epoch : {kEpoch + kMaxEpochRise + 1, INT64_MAX, int64_t{-1}, INT64_MIN})
    EXPECT_THAT(Refusal(Recover{epoch, {}}), HasSubstr("epoch")) << epoch;
  EXPECT_TRUE(CheckMessage(ThreeShards(), 0, 1, kMaxCounter, Fenced{kMaxCounter}).ok());
  EXPECT_FALSE(CheckMessage(ThreeShards(), 0, 1, kMaxCounter, Fenced{kMaxCounter + 1}).ok());
}

TEST(Check, ReportsAreOfShardsOfTheSender) {
  EXPECT_EQ(Refusal(Staged(1)), "");
  for (const ShardId shard : {-1, 3, 1 << 30, INT32_MIN})
    EXPECT_THAT(Refusal(Staged(shard)), HasSubstr("shard")) << shard;
  EXPECT_THAT(Refusal(Staged(0)), HasSubstr("not placed on server 1"));
  StageReport twice = Staged(1);
  twice.shards.push_back({.shard = 1});
  EXPECT_THAT(Refusal(twice), HasSubstr("shard 1 follows shard 1"));
  RecoverReport report;
  report.epoch = kEpoch;
  report.shards = {{1, 3, {}}, {2, 3, {}}};
  EXPECT_EQ(Refusal(report), "");
  report.shards[1].applied_step = -2;
  EXPECT_THAT(Refusal(report), HasSubstr("applied_step -2"));
  report.shards.clear();
  report.flushes.resize(2000);
  EXPECT_THAT(Refusal(report), HasSubstr("number of flushes 2000"));
}

TEST(Check, DecisionsHaveAnEntryForEachTensorAndTheirOwnIdentity) {
  EXPECT_EQ(Refusal(Prepares(Whole())), "");
  DecisionRecord decision = Whole();
  decision.scale = 2;
  EXPECT_THAT(Refusal(Prepares(decision)), HasSubstr("has identity"));
  decision = Whole();
  decision.applied_count.pop_back();
  EXPECT_THAT(Refusal(Prepares(decision)), HasSubstr("applied_count has 1 entries instead of 2"));
  decision = Whole();
  decision.untouched.push_back(0);
  EXPECT_THAT(Refusal(Prepares(decision)), HasSubstr("untouched has 3"));
  decision = Whole();
  decision.kind = static_cast<DecisionKind>(3);
  EXPECT_THAT(Refusal(Prepares(decision)), HasSubstr("kind of decision 3"));
  EXPECT_THAT(Refusal(Prepare{kEpoch, nullptr}), HasSubstr("no decision"));
}

TEST(Check, PlacementsGiveEveryShardAServerThatMayHoldIt) {
  const auto opens = [](Placement placement) {
    OpenJob message;
    message.epoch = kEpoch;
    message.placement = std::make_shared<Placement>(std::move(placement));
    return Message(message);
  };
  EXPECT_EQ(Refusal(opens({{{0, 1}}, {{1, 1}}, {{1, 1}}})), "");
  EXPECT_THAT(Refusal(opens({{{0, 1}}, {{1, 1}}})), HasSubstr("2 entries instead of 3"));
  EXPECT_THAT(Refusal(opens({{{0, 1}}, {}, {{1, 1}}})), HasSubstr("shard 1 has no copy"));
  EXPECT_THAT(Refusal(opens({{{0, 1}}, {{9, 1}}, {{1, 1}}})), HasSubstr("server 9"));
  EXPECT_THAT(Refusal(OpenJob{.epoch = kEpoch}), HasSubstr("no placement"));
}

TEST(Check, BoxesLieInTensors) {
  const auto refusal = [](const Contribution& part) {
    Layout layout;
    layout.by_rank = {{part}};
    return std::string(CheckBoxes(ThreeShards(), layout).message());
  };
  EXPECT_EQ(refusal({1, Mode::kSum, {{{0, 1}, {2, 1}}}}), "");
  EXPECT_THAT(refusal({2, Mode::kSum, {}}), HasSubstr("tensor 2"));
  EXPECT_THAT(refusal({-1, Mode::kSum, {}}), HasSubstr("tensor -1"));
  EXPECT_THAT(refusal({1, static_cast<Mode>(3), {}}), HasSubstr("mode 3"));
  for (const Box& box : {Box{{0, 1}, {2, 2}}, Box{{0}, {2}}, Box{{0, 0}, {2}},
                         Box{{UINT64_MAX, 0}, {2, 2}}, Box{{0}, {5}, true}})
    EXPECT_THAT(refusal({1, Mode::kSum, {box}}), HasSubstr("rank 0")) << ToString(box);
}

TEST(Check, TensorsWithoutGradientsAreKnownAndAscend) {
  const auto absent = [](std::vector<TensorId> tensors) {
    return Message(Absent{kEpoch, 1, 3, 1, 0, std::move(tensors)});
  };
  EXPECT_EQ(Refusal(absent({0, 1})), "");
  EXPECT_THAT(Refusal(absent({1, 0})), HasSubstr("tensor 0"));
  EXPECT_THAT(Refusal(absent({2})), HasSubstr("tensor 2"));
  EXPECT_THAT(Refusal(absent({})), HasSubstr("number of tensors 0"));
}

TEST(Check, WhatIsStoredIsCheckedAlike) {
  ParticipantImage image;
  image.shards = {{0, 3, {}}};
  EXPECT_TRUE(CheckImage(ThreeShards(), 0, image).ok());
  image.pieces.push_back({.key = {.shard = 1 << 30}});
  EXPECT_TRUE(absl::IsDataLoss(CheckImage(ThreeShards(), 0, image)));
  image.pieces = {{.key = {.shard = 0}, .applied_count = INT64_MAX}};  // a step adds one
  EXPECT_TRUE(absl::IsDataLoss(CheckImage(ThreeShards(), 0, image)));
  image.pieces.clear();
  image.discarded_attempt = INT64_MAX;  // the next attempt is one more
  EXPECT_TRUE(absl::IsDataLoss(CheckImage(ThreeShards(), 0, image)));
  image.discarded_attempt = 0;
  image.discarded_step = INT64_MIN;
  EXPECT_TRUE(absl::IsDataLoss(CheckImage(ThreeShards(), 0, image)));
  JobRecord record;
  record.in_sync = {{{0, 1}}, {{1, 1}}, {{1, 1}}};
  EXPECT_TRUE(CheckRecord(ThreeShards(), record).ok());
  record.in_sync[2][0].server = 5;
  EXPECT_TRUE(absl::IsDataLoss(CheckRecord(ThreeShards(), record)));
  record.in_sync.clear();
  record.version = INT64_MAX;  // a write adds one
  EXPECT_TRUE(absl::IsDataLoss(CheckRecord(ThreeShards(), record)));
  record.version = 1;
  record.epoch = INT64_MAX;
  EXPECT_TRUE(absl::IsDataLoss(CheckRecord(ThreeShards(), record)));
}

}  // namespace
}  // namespace orlop::step
