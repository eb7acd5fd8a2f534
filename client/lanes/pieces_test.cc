#include "client/lanes/pieces.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <random>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "base/box.h"
#include "client/link/manifest.h"
#include "orlop/v1/types.pb.h"

namespace orlop::client {
namespace {

Manifest OneTensor(const std::vector<uint64_t>& shape, uint64_t shard_elements) {
  v1::TensorSpec tensor;
  tensor.set_name("w");
  tensor.set_dtype(v1::DTYPE_F32);
  tensor.mutable_shape()->Add(shape.begin(), shape.end());
  return *Manifest::Build({tensor}, shard_elements, 0, v1::DURABILITY_MEMORY);
}

// Computes the flat indexes of a box's elements in row-major order by walking the whole tensor.
std::vector<uint32_t> FlatIndexes(const Box& box, const std::vector<uint64_t>& shape,
                                  uint64_t count) {
  std::vector<uint32_t> inside;
  for (uint64_t flat = 0; flat < count; ++flat) {
    uint64_t rest = flat;
    bool in = true;
    if (box.flat) in = flat >= box.offset[0] && flat < box.offset[0] + box.extent[0];
    for (size_t d = shape.size(); !box.flat && d-- > 0; rest /= shape[d]) {
      const uint64_t index = rest % shape[d];
      in = in && index >= box.offset[d] && index < box.offset[d] + box.extent[d];
    }
    if (in) inside.push_back(static_cast<uint32_t>(flat));
  }
  return inside;
}

Box RandomBox(const std::vector<uint64_t>& shape, uint64_t count, std::mt19937* random) {
  const bool flat = (*random)() % 3 == 0;
  Box box{.flat = flat};
  for (uint64_t size : flat ? std::vector<uint64_t>{count} : shape) {
    box.offset.push_back((*random)() % size);
    box.extent.push_back(1 + (*random)() % (size - box.offset.back()));
  }
  return box;
}

TEST(SplitPart, CutsRandomBoxesAsCountingThroughTheTensorDoes) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  for (int trial = 0; trial < 500; ++trial) {
    std::vector<uint64_t> shape(1 + random() % 4);
    uint64_t count = 1;
    for (uint64_t& size : shape) count *= size = 1 + random() % 12;
    const uint64_t shard_elements = 256;
    const Manifest manifest = OneTensor(shape, shard_elements);
    const std::optional<Box> box = RandomBox(shape, count, &random);
    // Every element's value is its own flat index.
    std::vector<uint32_t> data = FlatIndexes(*box, shape, count);
    std::vector<Piece> pieces;
    ASSERT_TRUE(SplitPart({0, "gradient", v1::DTYPE_F32, &box, reinterpret_cast<char*>(data.data()),
                           data.size() * 4},
                          manifest, &pieces)
                    .ok());
    std::vector<uint32_t> seen;
    for (const Piece& piece : pieces) {
      ASSERT_GT(piece.bytes, 0u);
      for (size_t i = 0; i < piece.bytes; i += 4) {
        uint32_t flat;
        std::memcpy(&flat, piece.data + i, 4);
        ASSERT_EQ(flat / shard_elements, piece.region.shard());
        seen.push_back(flat);
      }
    }
    ASSERT_EQ(seen, data) << ToString(*box);
  }
}

TEST(SplitPart, RefusesWrongSizesAndBoxesNamingTheTensor) {
  const Manifest manifest = OneTensor({4, 5}, 256);
  char bytes[80];
  std::vector<Piece> pieces;
  const auto split = [&](uint32_t tensor, const std::optional<Box>& box, size_t size) {
    return SplitPart({tensor, "gradient", v1::DTYPE_F32, &box, bytes, size}, manifest, &pieces);
  };
  EXPECT_TRUE(split(0, {}, 80).ok());
  EXPECT_EQ(split(1, {}, 80).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(split(0, {}, 79).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(split(0, {}, 79).message().find("tensor w"), absl::string_view::npos);
  EXPECT_EQ(split(0, Box{{4, 0}, {1, 5}}, 20).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(split(0, Box{{~uint64_t{0}}, {2}, true}, 8).code(), absl::StatusCode::kInvalidArgument);
}

TEST(SplitPart, CutsScalesAndFourBitCodesAsTheyAreStored) {
  const uint64_t count = 256 * 5 + 77;
  const Manifest manifest = OneTensor({count}, 512);
  const std::optional<Box> whole = WholeTensor(count), shifted = Box{{512}, {count - 512}, true};
  char bytes[count * 4];
  const auto sizes = [&](std::string_view slot, v1::DType dtype, const std::optional<Box>& box,
                         size_t size) {
    std::vector<Piece> pieces;
    std::vector<size_t> found;
    EXPECT_TRUE(SplitPart({0, slot, dtype, &box, bytes, size}, manifest, &pieces).ok());
    const char* next = bytes;
    for (const Piece& piece : pieces) {
      EXPECT_EQ(piece.data, next);
      next += piece.bytes;
      found.push_back(piece.bytes);
    }
    return found;
  };
  using Sizes = std::vector<size_t>;
  EXPECT_EQ(sizes("exp_avg_absmax", v1::DTYPE_F32, whole, 6 * 4), (Sizes{8, 8, 8}));
  EXPECT_EQ(sizes("exp_avg_absmax", v1::DTYPE_F32, shifted, 4 * 4), (Sizes{8, 8}));
  EXPECT_EQ(sizes("exp_avg_absmax", v1::DTYPE_F32, whole, 11 * 4), (Sizes{16, 16, 12}));
  EXPECT_EQ(sizes("exp_avg", v1::DTYPE_U8, whole, count), (Sizes{512, 512, 333}));
  EXPECT_EQ(sizes("exp_avg", v1::DTYPE_U8, whole, 679), (Sizes{256, 256, 167}));
  std::vector<Piece> pieces;
  for (const size_t size : {count * 4, size_t{5 * 4}, size_t{7 * 4}})
    EXPECT_FALSE(
        SplitPart({0, "exp_avg_absmax", v1::DTYPE_F32, &whole, bytes, size}, manifest, &pieces)
            .ok());
}

// Every piece has blocks of its own, so its last block may be short.
TEST(SplitPart, CutsInt8BlocksPieceByPiece) {
  const Manifest manifest = OneTensor({3000}, 1024);
  std::vector<char> data(2 * 4 + 424 + 4 * 4 + 1024 + 4 + 52);  // [600, 2100)
  const std::optional<Box> box = Box{{600}, {1500}, true};
  PartView part{0, "gradient", v1::DTYPE_I8_BLOCK, &box, data.data(), data.size(), {}};
  std::vector<Piece> pieces;
  ASSERT_TRUE(SplitPart(part, manifest, &pieces).ok());
  ASSERT_EQ(pieces.size(), 3);
  const size_t bytes[] = {432, 1040, 56};
  size_t at = 0;
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(pieces[i].region.shard(), i);
    EXPECT_EQ(pieces[i].region.dtype(), v1::DTYPE_I8_BLOCK);
    EXPECT_EQ(pieces[i].data, data.data() + at);
    EXPECT_EQ(pieces[i].bytes, bytes[i]);
    at += bytes[i];
  }
  part.bytes -= 1;
  EXPECT_EQ(
      SplitPart(part, manifest, &pieces).message(),
      "tensor w: size of data is 1527 bytes; expected 1500 elements of int8 with block scales, "
      "1528 bytes");
  EXPECT_EQ(pieces.size(), 3);
}

TEST(FlatSlice, CoversEveryElementOnceInWholeBlocks) {
  for (uint64_t count : {1ull, 255ull, 256ull, 257ull, 1000ull, 4096ull, 100'001ull})
    for (uint32_t world : {1u, 2u, 3u, 7u}) {
      uint64_t next = 0;
      for (uint32_t rank = 0; rank < world; ++rank) {
        const std::optional<Box> slice = FlatSlice(count, rank, world);
        if (!slice) continue;
        EXPECT_EQ(slice->offset[0], next);
        EXPECT_EQ(slice->offset[0] % 256, 0u);
        next += slice->extent[0];
      }
      EXPECT_EQ(next, count);
    }
}

}  // namespace
}  // namespace orlop::client
