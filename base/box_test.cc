#include "base/box.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_join.h"

namespace orlop {
namespace {

// Returns every flat index of a box, by brute force.
std::vector<uint64_t> FlatIndexes(const Box& box, const std::vector<uint64_t>& shape) {
  std::vector<uint64_t> indexes;
  if (box.flat) {
    for (uint64_t i = 0; i < box.extent[0]; ++i) indexes.push_back(box.offset[0] + i);
    return indexes;
  }
  for (uint64_t n = 0; n < BoxElementCount(box); ++n) {
    uint64_t rest = n, flat = 0, stride = 1;
    for (size_t i = shape.size(); i-- > 0;) {
      flat += (box.offset[i] + rest % box.extent[i]) * stride;
      rest /= box.extent[i];
      stride *= shape[i];
    }
    indexes.push_back(flat);
  }
  return indexes;
}

TEST(Box, PartsAndRunsEqualBruteForceForRandomBoxes) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  const auto below = [&](uint64_t n) { return random() % n; };
  for (int trial = 0; trial < 3000; ++trial) {
    std::vector<uint64_t> shape(below(5));
    for (uint64_t& dimension : shape) dimension = 1 + below(6);
    const uint64_t count = *ElementCount(shape);
    Box box;
    if (below(4) == 0) {
      const uint64_t offset = below(count);
      box = {{offset}, {1 + below(count - offset)}, true};
    } else {
      for (uint64_t dimension : shape) {
        box.offset.push_back(below(dimension));
        box.extent.push_back(1 + below(dimension - box.offset.back()));
      }
    }
    ASSERT_TRUE(ValidateBox(box, shape, count).ok());
    const std::vector<uint64_t> indexes = FlatIndexes(box, shape);
    ASSERT_EQ(FlatIndexes(Simplified(box, shape), shape), indexes) << ToString(box);
    const uint64_t begin = below(count + 1);
    const Range range = {begin, begin + below(count + 1 - begin)};
    const Range part = BoxPart(box, shape, range);
    std::vector<uint64_t> expected, visited;
    for (size_t i = 0; i < indexes.size(); ++i) {
      if (indexes[i] < range.begin || indexes[i] >= range.end) continue;
      ASSERT_TRUE(i >= part.begin && i < part.end) << ToString(box) << " index " << i;
      expected.push_back(indexes[i]);
    }
    ASSERT_EQ(part.count(), expected.size());
    ForEachRun(box, shape, range, [&](Range run) {
      for (uint64_t i = run.begin; i < run.end; ++i) visited.push_back(i);
    });
    ASSERT_EQ(visited, expected) << ToString(box) << " of [" << absl::StrJoin(shape, ",") << "]";
  }
}

// Every run against a walk over all elements of the tensor.
TEST(RunIterator, MatchesBruteForceOnRandomBoxesAndShards) {
  std::mt19937_64 random(20240607);
  const auto below = [&](uint64_t limit) { return static_cast<uint64_t>(random() % limit); };
  for (int round = 0; round < 3000; ++round) {
    Shape shape;
    for (uint64_t d = 1 + below(5); d > 0; --d) shape.push_back(1 + below(4));
    const uint64_t total = *ElementCount(shape);
    Box box;
    for (uint64_t length : shape) {
      const uint64_t offset = below(length);
      box.offset.push_back(offset);
      box.extent.push_back(1 + below(length - offset));
    }
    if (below(4) == 0) {
      const uint64_t begin = below(total);
      box = FlatBox(begin, 1 + below(total - begin));
    }
    const uint64_t begin = below(total), count = 1 + below(total - begin);
    std::vector<std::pair<uint64_t, uint64_t>> expected;  // (in tensor, in box)
    uint64_t in_box = 0;
    for (uint64_t element = 0; element < total; ++element) {
      uint64_t rest = element;
      bool inside = true;
      if (!box.flat) {
        for (size_t d = shape.size(); d-- > 0;) {
          const uint64_t at = rest % shape[d];
          rest /= shape[d];
          inside &= at >= box.offset[d] && at < box.offset[d] + box.extent[d];
        }
      } else {
        inside = element >= box.offset[0] && element < box.offset[0] + box.extent[0];
      }
      if (inside && element >= begin && element < begin + count)
        expected.push_back({element, in_box});
      in_box += inside;
    }
    std::vector<std::pair<uint64_t, uint64_t>> got;
    RunIterator runs(box, shape, {begin, begin + count});
    for (orlop::Run run; runs.Next(&run);) {
      for (uint64_t i = 0; i < run.count; ++i)
        got.push_back({run.tensor_begin + i, run.box_begin + i});
    }
    ASSERT_EQ(got, expected) << "round " << round;
    const Range part = BoxPart(box, shape, {begin, begin + count});
    ASSERT_EQ(part.count(), expected.size()) << "round " << round;
    if (!expected.empty()) {
      ASSERT_EQ(part.begin, expected[0].second) << "round " << round;
    }
  }
}

TEST(Box, RefusesWhatDoesNotFitNamingDimensionAndLimit) {
  const std::vector<uint64_t> shape = {4, 6};
  EXPECT_TRUE(ValidateBox({{0, 0}, {4, 6}}, shape, 24).ok());
  EXPECT_FALSE(ValidateBox({{0}, {4}}, shape, 24).ok());
  EXPECT_FALSE(ValidateBox({{0, 0}, {4, 0}}, shape, 24).ok());
  EXPECT_FALSE(ValidateBox({{25}, {1}, true}, shape, 24).ok());
  const absl::Status overflow = ValidateBox({{1, 0}, {UINT64_MAX, 6}}, shape, 24);
  EXPECT_EQ(overflow.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(overflow.message().find("dimension 0 of size 4"), absl::string_view::npos) << overflow;
}

TEST(Box, ElementCountRefusesOverflowZeroAndTooManyDimensions) {
  EXPECT_EQ(*ElementCount({}), 1u);
  EXPECT_EQ(*ElementCount({3, 5}), 15u);
  EXPECT_FALSE(ElementCount({uint64_t{1} << 40, uint64_t{1} << 40}).ok());
  EXPECT_FALSE(ElementCount({3, 0}).ok());
  EXPECT_FALSE(ElementCount(std::vector<uint64_t>(9, 1)).ok());
  EXPECT_FALSE(ElementCount({INT64_MAX, 2}).ok());
  EXPECT_FALSE(ElementCount({UINT64_MAX}).ok());
}

}  // namespace
}  // namespace orlop
