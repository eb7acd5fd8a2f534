#include "server/job/step_codec.h"

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "base/box.h"
#include "gtest/gtest.h"
#include "orlop/v1/peer.pb.h"
#include "server/step/layout.h"
#include "server/step/messages.h"

namespace orlop::server {
namespace {

TEST(StepCodec, LayoutsTakeTheBytesThatTheMachineCounts) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const auto number = [&] { return random() >> (random() % 60 + 4); };
  for (int i = 0; i < 200; ++i) {
    step::Layout layout;
    layout.by_rank.resize(random() % 5);
    for (auto& rank : layout.by_rank) {
      rank.resize(random() % 6);
      for (step::Contribution& part : rank) {
        part.tensor = static_cast<step::TensorId>(number() & INT32_MAX);
        part.mode = static_cast<step::Mode>(random() % 3);
        part.boxes.resize(random() % 4);
        for (Box& box : part.boxes) {
          box.offset.resize(random() % 4);
          for (uint64_t& at : box.offset) at = number();
          box.extent = box.offset;
        }
      }
    }
    v1::LayoutBody wire;
    ToWire(layout, &wire);
    EXPECT_EQ(step::EncodedBytes(layout), wire.ByteSizeLong());
  }
}

TEST(StepCodec, NumbersOfNoEnumeratorStayWrong) {
  v1::DecisionBody decision;
  for (const uint32_t kind : {3u, 300u, UINT32_MAX}) {
    decision.set_kind(kind);
    EXPECT_GT(static_cast<int>(ToStep(decision)->kind), 2) << kind;
  }
  v1::StepMessage message;
  message.mutable_prepared()->set_level(4);
  EXPECT_GT(static_cast<int>(std::get<step::Prepared>(*ToStep(message)).level), 3);
  v1::LayoutBody layout;
  layout.add_ranks()->add_tensors()->set_mode(7);
  EXPECT_GT(static_cast<int>(ToStep(layout)->by_rank[0][0].mode), 2);
}

TEST(StepCodec, ErrorsOfACodeThatNoStepHasAreUnavailable) {
  v1::StepMessage message;
  using Code = absl::StatusCode;
  for (const Code known : {Code::kInvalidArgument, Code::kDataLoss}) {
    message.mutable_seal_reply()->mutable_status()->set_code(static_cast<int>(known));
    EXPECT_EQ(std::get<step::SealReply>(*ToStep(message)).status.code(), known);
  }
  const int cancelled = static_cast<int>(Code::kCancelled),
            internal = static_cast<int>(Code::kInternal);
  for (const int code : {-1, cancelled, 2, internal, 16, 17, INT32_MAX}) {
    v1::PeerStatus* status = message.mutable_seal_reply()->mutable_status();
    status->set_code(code);
    status->set_message(std::string(100'000, 'x'));
    const absl::Status told = std::get<step::SealReply>(*ToStep(message)).status;
    EXPECT_TRUE(absl::IsUnavailable(told)) << code;
    EXPECT_LT(told.message().size(), 10'000u);
  }
}

}  // namespace
}  // namespace orlop::server
