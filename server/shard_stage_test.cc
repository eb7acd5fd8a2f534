// Staging of gradients.
#include <cmath>
#include <limits>
#include <optional>

#include "server/shard_fixture.h"

namespace orlop::server {
namespace {

using testing::HasSubstr;

TEST(Staging, RefusesChunksOutOfOrderAndDamagedOnes) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {1024, 1024})}, 1 << 20));
  ASSERT_TRUE(store->SetLayout(WholeLayout(store->layout())).ok());
  const auto bytes = AsBytes(Normal(1 << 20, 1));
  auto chunk = [&](uint64_t leaf) {
    return absl::MakeConstSpan(bytes).subspan(leaf * kLeafBytes, kLeafBytes);
  };
  auto write = [&](PieceWriter* writer, uint64_t offset_leaf, uint64_t leaf, uint64_t wrong = 0) {
    const absl::Span<const uint8_t> slices[] = {chunk(leaf)};
    return writer->WriteChunk(offset_leaf * kLeafBytes, slices,
                              Checksum64(slices[0].data(), kLeafBytes) ^ wrong);
  };
  auto writer = store->BeginGradient(0, 0, 0, v1::DTYPE_F32).value();
  ASSERT_TRUE(write(writer.get(), 0, 0).ok());
  EXPECT_TRUE(absl::IsUnavailable(store->BeginGradient(0, 0, 0, v1::DTYPE_F32).status()));
  EXPECT_THAT(std::string(write(writer.get(), 2, 2).message()), HasSubstr("missing"));
  writer = store->BeginGradient(0, 0, 0, v1::DTYPE_F32).value_or(nullptr);
  ASSERT_EQ(writer, nullptr);  // the lost one still holds its claim; it goes with its stream
  writer.reset();
  writer = store->BeginGradient(0, 0, 0, v1::DTYPE_F32).value();
  ASSERT_TRUE(write(writer.get(), 0, 0).ok());
  EXPECT_THAT(std::string(write(writer.get(), 0, 0).message()), HasSubstr("repeated"));
  writer.reset();
  writer = store->BeginGradient(0, 0, 0, v1::DTYPE_F32).value();
  const absl::Status damaged = write(writer.get(), 0, 0, 1);
  EXPECT_TRUE(absl::IsAborted(damaged));
  EXPECT_EQ(DetailOf(damaged).reason(), v1::ErrorDetail::CHECKSUM);
  writer.reset();
  writer = store->BeginGradient(0, 0, 0, v1::DTYPE_F32).value();
  ASSERT_TRUE(write(writer.get(), 0, 0).ok());
  EXPECT_TRUE(absl::IsInvalidArgument(writer->Finish({}).status()));  // bytes missing
  writer.reset();
  EXPECT_TRUE(store->StageGradient(0).value().absent);
  store->DropStaged();
  EXPECT_TRUE(Send(store->BeginGradient(0, 0, 0, v1::DTYPE_F32), bytes, 4 * kLeafBytes).ok());
}

TEST(Staging, RepeatedPieceKeepsTheFirst) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {300, 10})}, 1 << 20));
  ASSERT_TRUE(store->SetLayout(WholeLayout(store->layout())).ok());
  const auto first = AsBytes(Normal(3000, 1)), other = AsBytes(Normal(3000, 2));
  ASSERT_TRUE(Send(store->BeginGradient(0, 0, 0, v1::DTYPE_F32), first).ok());
  ASSERT_TRUE(Send(store->BeginGradient(0, 0, 0, v1::DTYPE_F32), other).ok());
  EXPECT_EQ(store->StageGradient(0).value().digest, DigestOfBytes(first));
}

TEST(Staging, NormAndDigestDoNotDependOnChunks) {
  for (const v1::DType dtype : {v1::DTYPE_F32, v1::DTYPE_BF16}) {
    std::optional<StagedShard> expected;
    for (const size_t chunk_bytes : {kLeafBytes, 4 * kLeafBytes}) {
      World world;
      auto store = NewStore(&world, Layout({Parameter("w", {1025, 2049})}, 1 << 26));
      ASSERT_TRUE(store->SetLayout(WholeLayout(store->layout())).ok());
      const auto values = Normal(1025 * 2049, 3);
      auto bytes = AsBytes(values);
      if (dtype == v1::DTYPE_BF16) bytes.resize(bytes.size() / 2);
      ASSERT_TRUE(Send(store->BeginGradient(0, 0, 0, dtype), bytes, chunk_bytes).ok());
      const StagedShard staged = store->StageGradient(0).value();
      kernels::BlockSums sums;
      kernels::ReduceGradient(
          {dtype == v1::DTYPE_F32 ? kernels::DType::kF32 : kernels::DType::kBF16, bytes.data(),
           values.size()},
          &sums);
      EXPECT_EQ(staged.sum_squares, sums.sum_squares);
      EXPECT_EQ(staged.nonfinite_count, sums.nonfinite_count);
      EXPECT_EQ(staged.digest, DigestOfBytes(bytes));
      if (dtype == v1::DTYPE_F32) {
        double exact = 0;
        for (float value : values) exact += double{value} * value;
        EXPECT_NEAR(staged.sum_squares, exact, 1e-9 * exact);
      }
      if (expected) {
        EXPECT_EQ(staged.digest, expected->digest);
        EXPECT_EQ(staged.sum_squares, expected->sum_squares);
      }
      expected = staged;
    }
  }
}

// Three contributors: sums in rank order, whatever the order of arrival and the shape of the boxes.
TEST(Staging, SumsInRankOrder) {
  World world;
  constexpr uint64_t kRows = 700, kColumns = 1000;
  auto store = NewStore(&world, Layout({Parameter("w", {kRows, kColumns})}, 256 * 1024));
  std::vector<ExpectedPiece> pieces;
  for (const OwnedShard& shard : store->layout().shards) {
    pieces.push_back({shard.id, 0, 0, WholeTensor(kRows * kColumns)});
    pieces.push_back({shard.id, 1, 0, Rectangle({0, 0}, {kRows, 400})});
    pieces.push_back({shard.id, 1, 1, Rectangle({0, 400}, {kRows, 600})});
    pieces.push_back({shard.id, 2, 0, Rectangle({0, 0}, {kRows, kColumns})});
  }
  ASSERT_TRUE(store->SetLayout(pieces).ok());
  std::vector<std::vector<float>> gradients;
  for (uint32_t rank = 0; rank < 3; ++rank)
    gradients.push_back(Normal(kRows * kColumns, rank + 10));
  for (const OwnedShard& shard : store->layout().shards)
    for (int p = 3; p >= 0; --p) {  // the last rank first
      const ExpectedPiece& piece = pieces[shard.id * 4 + p];
      std::vector<float> part;
      ForEachRun(piece.box, {kRows, kColumns}, shard.range, [&](Range run) {
        part.insert(part.end(), gradients[piece.rank].begin() + run.begin,
                    gradients[piece.rank].begin() + run.end);
      });
      ASSERT_TRUE(Send(store->BeginGradient(shard.id, piece.rank, piece.region, v1::DTYPE_F32),
                       AsBytes(part))
                      .ok());
    }
  for (const OwnedShard& shard : store->layout().shards) {
    std::vector<float> sum;
    for (uint64_t i = shard.range.begin; i < shard.range.end; ++i) {
      float value = gradients[0][i] + gradients[1][i];
      sum.push_back(value + gradients[2][i]);
    }
    EXPECT_EQ(store->StageGradient(shard.id).value().digest, DigestOfBytes(AsBytes(sum)));
  }
}

// Disjoint slices and columns of one gradient lie where the whole would.
TEST(Staging, JoinsPartsOfOneGradient) {
  World world;
  constexpr uint64_t kRows = 512, kColumns = 768;
  const auto gradient = Normal(kRows * kColumns, 5);
  const std::vector<std::vector<Box>> layouts = {
      {Flat(0, 100'000), Flat(100'000, kRows * kColumns - 100'000)},
      {Rectangle({0, 0}, {kRows, 256}), Rectangle({0, 256}, {kRows, 512})},
  };
  for (const std::vector<Box>& boxes : layouts) {
    auto store = NewStore(&world, Layout({Parameter("w", {kRows, kColumns})}, 1 << 22));
    std::vector<ExpectedPiece> pieces;
    for (uint32_t rank = 0; rank < boxes.size(); ++rank)
      pieces.push_back({0, rank, 0, boxes[rank]});
    ASSERT_TRUE(store->SetLayout(pieces).ok());
    for (uint32_t rank = 0; rank < boxes.size(); ++rank) {
      std::vector<float> part;
      ForEachRun(boxes[rank], {kRows, kColumns}, {0, kRows * kColumns}, [&](Range run) {
        part.insert(part.end(), gradient.begin() + run.begin, gradient.begin() + run.end);
      });
      ASSERT_TRUE(Send(store->BeginGradient(0, rank, 0, v1::DTYPE_F32), AsBytes(part)).ok());
    }
    const StagedShard staged = store->StageGradient(0).value();
    kernels::BlockSums sums;
    kernels::ReduceGradient({kernels::DType::kF32, gradient.data(), gradient.size()}, &sums);
    EXPECT_EQ(staged.digest, DigestOfBytes(AsBytes(gradient)));
    EXPECT_EQ(staged.sum_squares, sums.sum_squares);
  }
}

TEST(Staging, AbsentContributorsAreZeroAndNonFiniteIsCounted) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {4, 1000})}, 1 << 20));
  ASSERT_TRUE(store->SetLayout({{0, 0, 0, Flat(0, 2000)}, {0, 1, 0, Flat(2000, 2000)}}).ok());
  auto half = Normal(2000, 1);
  half[7] = std::numeric_limits<float>::infinity();
  half[9] = std::nanf("");
  ASSERT_TRUE(Send(store->BeginGradient(0, 0, 0, v1::DTYPE_F32), AsBytes(half)).ok());
  half.resize(4000, 0.0f);
  const StagedShard staged = store->StageGradient(0).value();
  EXPECT_EQ(staged.digest, DigestOfBytes(AsBytes(half)));
  EXPECT_EQ(staged.nonfinite_count, 2u);
  store->DropStaged();
  EXPECT_TRUE(store->StageGradient(0).value().absent);
}

// A sum that was asked for before its attempt was dropped runs when another attempt is half there.
TEST(Staging, SumOfADroppedAttemptTakesNothingOfTheNext) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {5000})}, 1 << 20));
  ASSERT_TRUE(store->SetLayout(WholeLayout(store->layout(), 2)).ok());
  const auto first = Normal(5000, 1), second = Normal(5000, 2);
  PushTensor(store.get(), 0, 0, first);
  PushTensor(store.get(), 0, 1, first);
  const ShardStore::Stager dropped = store->StagerOf(0, false);
  store->DropStaged();
  PushTensor(store.get(), 0, 0, first);
  EXPECT_EQ(dropped().status().code(), absl::StatusCode::kAborted);
  PushTensor(store.get(), 0, 1, second);
  std::vector<float> sum(5000);
  for (size_t i = 0; i < sum.size(); ++i) sum[i] = first[i] + second[i];
  EXPECT_EQ(store->StageGradient(0).value().digest, DigestOfBytes(AsBytes(sum)));
}

TEST(Staging, DroppedAttemptRefusesItsWritersAndFreesMemory) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {1024, 1024})}, 1 << 20));
  const uint64_t before = world.accountant.used_bytes(Tier::kDram);
  ASSERT_TRUE(store->SetLayout(WholeLayout(store->layout())).ok());
  const auto bytes = AsBytes(Normal(1 << 20, 1));
  auto writer = store->BeginGradient(0, 0, 0, v1::DTYPE_F32).value();
  store->DropStaged();
  EXPECT_TRUE(absl::IsAborted(Send(writer.get(), bytes)));
  EXPECT_TRUE(Send(store->BeginGradient(0, 0, 0, v1::DTYPE_F32), bytes).ok());
  writer.reset();
  store->DropStaged();
  EXPECT_EQ(world.accountant.used_bytes(Tier::kDram), before);
}

TEST(Staging, RefusesWhatIsNotExpected) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {40, 100})}, 1 << 20));
  EXPECT_TRUE(absl::IsInvalidArgument(store->SetLayout({{0, 0, 0, Flat(3999, 2)}})));
  EXPECT_TRUE(absl::IsInvalidArgument(
      store->SetLayout({{0, 0, 0, Flat(std::numeric_limits<uint64_t>::max(), 2)}})));
  EXPECT_TRUE(absl::IsNotFound(store->SetLayout({{1, 0, 0, Flat(0, 2)}})));
  ASSERT_TRUE(store->SetLayout(WholeLayout(store->layout())).ok());
  EXPECT_TRUE(absl::IsInvalidArgument(store->BeginGradient(0, 1, 0, v1::DTYPE_F32).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(store->BeginGradient(0, 0, 1, v1::DTYPE_F32).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(store->BeginGradient(0, 0, 0, v1::DTYPE_I64).status()));
  EXPECT_TRUE(absl::IsNotFound(store->BeginGradient(9, 0, 0, v1::DTYPE_F32).status()));
}

TEST(Staging, RefusesALayoutBeyondTheBudget) {
  World world(8 * kMiB);
  auto store = NewStore(&world, Layout({Parameter("w", {1024, 1024})}, 1 << 20));
  EXPECT_TRUE(store->SetLayout(WholeLayout(store->layout())).ok());
  const absl::Status refused = store->SetLayout(WholeLayout(store->layout(), 3));
  EXPECT_TRUE(absl::IsResourceExhausted(refused));
  EXPECT_THAT(std::string(refused.message()), HasSubstr("staging"));
  EXPECT_TRUE(store->SetLayout(WholeLayout(store->layout())).ok());
}

}  // namespace
}  // namespace orlop::server
