#include "server/step/layout.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "base/box.h"
#include "gtest/gtest.h"
#include "server/step/identity.h"

namespace orlop::step {
namespace {

std::vector<TensorSpec> OneTensor(Shape shape) { return {{"w", std::move(shape), true}}; }

absl::Status Validate(const Shape& shape, Mode mode, std::vector<std::vector<Box>> boxes_by_rank) {
  Layout layout;
  for (auto& boxes : boxes_by_rank) layout.by_rank.push_back({{0, mode, std::move(boxes)}});
  return ValidateLayout(OneTensor(shape), layout);
}

TEST(Layout, AcceptsWholeTensorsFromEveryRankAndPartsFromOne) {
  const Box whole{{0, 0}, {4, 6}};
  EXPECT_TRUE(Validate({4, 6}, Mode::kSum, {{whole}, {whole}, {whole}}).ok());
  EXPECT_TRUE(
      Validate({4, 6}, Mode::kExactlyOnce, {{Box{{0, 0}, {4, 2}}}, {Box{{0, 2}, {4, 4}}}}).ok());
  // Flat ranges that cut rows, beside each other and beside boxes.
  EXPECT_TRUE(Validate({4, 6}, Mode::kExactlyOnce, {{FlatBox(0, 11)}, {FlatBox(11, 13)}}).ok());
  EXPECT_TRUE(Validate({4, 6}, Mode::kSum, {{FlatBox(0, 11)}, {FlatBox(11, 13)}, {whole}}).ok());
  EXPECT_TRUE(Validate({}, Mode::kSum, {{FlatBox(0, 1)}}).ok());
  EXPECT_TRUE(Validate({4, 6}, Mode::kNone, {{}, {}}).ok());
}

TEST(Layout, RefusesGapsOverlapsAndUnevenMultiplicityByName) {
  const Box whole{{0, 0}, {4, 6}};
  const Box left{{0, 0}, {4, 3}}, right{{0, 3}, {4, 3}};
  const std::vector<std::pair<absl::Status, std::string>> cases = {
      {Validate({4, 6}, Mode::kSum, {{left}}),
       "gap: element [0,3] (flat index 3 of 24) comes from 0"},
      {Validate({4, 6}, Mode::kSum, {{left, Box{{0, 2}, {4, 4}}}}),
       "boxes [0,0]+[4,3] and [0,2]+[4,4] of rank 0 overlap"},
      {Validate({4, 6}, Mode::kSum, {{whole}, {left}}),
       "uneven multiplicity: element [0,3] (flat index 3 of 24) comes from 1 contributors (rank 0"},
      {Validate({4, 6}, Mode::kSum, {{left, right}, {left}, {left}}), "uneven"},
      {Validate({4, 6}, Mode::kExactlyOnce, {{whole}, {FlatBox(9, 2)}}),
       "overlap: element [1,3] (flat index 9 of 24) comes from 2 contributors (rank 0 in "
       "[0,0]+[4,6], rank 1 in flat[9]+[2]); exactly one is the limit"},
      {Validate({4, 6}, Mode::kNone, {{left}}), "frozen"},
      {Validate({4, 6}, Mode::kSum, {{Box{{0, 4}, {4, 3}}}}), "outside dimension 1"},
      {Validate({4, 6}, Mode::kSum, {{Box{{0, INT64_MAX}, {4, 2}}}}), "outside"},
      {Validate({4, 6}, Mode::kSum, {{Box{{0, 0, 0}, {1, 1, 1}}}}), "3 offsets"},
  };
  for (const auto& [status, part] : cases) {
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_NE(status.message().find("tensor w"), std::string::npos) << status;
    EXPECT_NE(status.message().find(part), std::string::npos) << status;
  }
  EXPECT_TRUE(absl::IsInvalidArgument(ValidateLayout(OneTensor({2}), Layout{{{}}, Digest{}})));
}

// Three tensors of 4,096 elements, each a box of its own, and one whose boxes overlap.
absl::Status ValidateCells(const Shape& shape) {
  std::vector<TensorSpec> tensors(3, {"cells", shape, true});
  tensors.push_back({"last", {4, 6}, true});
  Layout layout{{{}}, Digest{}};
  for (int32_t tensor = 0; tensor < 3; ++tensor) {
    Contribution cells{tensor, Mode::kExactlyOnce, {}};
    for (uint64_t row = 0; row < shape[0]; ++row)
      for (uint64_t column = 0; column < shape[1]; ++column)
        cells.boxes.push_back(Box{{row, column}, {1, 1}});
    layout.by_rank[0].push_back(cells);
  }
  layout.by_rank[0].push_back({3, Mode::kExactlyOnce, {Box{{0, 0}, {4, 3}}, Box{{0, 2}, {4, 3}}}});
  return ValidateLayout(tensors, layout);
}

TEST(Layout, FindsAnOverlapAfterManyBoxesOrRefusesToLook) {
  const absl::Status found = ValidateCells({64, 64});
  EXPECT_TRUE(absl::IsInvalidArgument(found)) << found;
  EXPECT_NE(found.message().find("of rank 0 overlap"), std::string::npos) << found;
  const absl::Status too_much = ValidateCells({1, 4096});  // all boxes begin in one row
  EXPECT_TRUE(absl::IsResourceExhausted(too_much)) << too_much;
}

TEST(Layout, ExpectedPiecesOfAShardCoverIt) {
  const std::vector<TensorSpec> tensors = OneTensor({4, 6});
  Layout layout;
  layout.by_rank = {{{0, Mode::kExactlyOnce, {Box{{0, 0}, {4, 2}}}}},
                    {{0, Mode::kExactlyOnce, {Box{{0, 2}, {4, 4}}}}}};
  const std::vector<ExpectedPiece> pieces = ExpectedPieces(tensors, {0, {7, 17}, {0}}, layout);
  // Flat 7..16 are (1,1)..(2,4): of rank 0 (1,1),(2,0),(2,1), elements 3..5 of its box.
  const std::vector<ExpectedPiece> expected = {{0, 0, {3, 6}}, {1, 0, {4, 11}}};
  EXPECT_EQ(pieces, expected);
}

TEST(Identity, TellsFieldsAndBoundariesApart) {
  EXPECT_NE(DigestBuilder().AddBytes("ab").AddBytes("c").Finish(),
            DigestBuilder().AddBytes("a").AddBytes("bc").Finish());
  EXPECT_NE(DigestBuilder().AddDouble(0.0).Finish(), DigestBuilder().AddDouble(-0.0).Finish());
  EXPECT_FALSE(DigestBuilder().Finish().empty());
}

}  // namespace
}  // namespace orlop::step
