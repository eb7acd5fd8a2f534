// Tests the staging of gradients.
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "base/checksum.h"
#include "kernels/int8_blocks.h"
#include "kernels/optimizer.h"
#include "kernels/reduce.h"
#include "kernels/types.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"
#include "server/job/contributions.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/shards/piece_writer.h"
#include "server/shards/testing/shard_fixture.h"

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
  // A writer that has failed holds its claim until its stream destroys it.
  writer = store->BeginGradient(0, 0, 0, v1::DTYPE_F32).value_or(nullptr);
  ASSERT_EQ(writer, nullptr);
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
  EXPECT_TRUE(absl::IsInvalidArgument(writer->Finish({}).status()));  // bytes are missing
  writer.reset();
  EXPECT_TRUE(StageGradient(store, 0).value().absent);
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
  EXPECT_EQ(StageGradient(store, 0).value().digest, DigestOfBytes(first));
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
      const StagedShard staged = StageGradient(store, 0).value();
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

// The gradients of three contributors are summed in rank order, whatever the order of arrival and
// the boxes of the pieces.
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
  gradients.reserve(3);
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
    EXPECT_EQ(StageGradient(store, shard.id).value().digest, DigestOfBytes(AsBytes(sum)));
  }
}

// Disjoint slices or columns of one gradient give the staged bytes of the whole gradient.
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
    pieces.reserve(boxes.size());
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
    const StagedShard staged = StageGradient(store, 0).value();
    kernels::BlockSums sums;
    kernels::ReduceGradient({kernels::DType::kF32, gradient.data(), gradient.size()}, &sums);
    EXPECT_EQ(staged.digest, DigestOfBytes(AsBytes(gradient)));
    EXPECT_EQ(staged.sum_squares, sums.sum_squares);
  }
}

// Returns values as int8 blocks with scales, as on the wire.
std::vector<uint8_t> Int8(const std::vector<float>& values) {
  std::vector<uint8_t> wire(kernels::Int8Bytes(values.size()));
  EXPECT_TRUE(kernels::EncodeInt8({kernels::DType::kF32, values.data(), values.size()}, nullptr,
                                  absl::MakeSpan(wire))
                  .ok());
  return wire;
}
std::vector<uint16_t> Int8Decoded(const std::vector<uint8_t>& wire) {
  std::vector<uint16_t> values(kernels::Int8Count(wire.size()));
  EXPECT_TRUE(kernels::DecodeInt8(wire, absl::MakeSpan(values)).ok());
  return values;
}
std::vector<uint8_t> BF16Bytes(const std::vector<uint16_t>& values) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
  return {bytes, bytes + 2 * values.size()};
}

// Chunks end inside a block, and the piece ends with a short block. What is staged is bf16, and
// takes no more memory than was reserved.
TEST(Staging, DecodesInt8AsItComes) {
  constexpr uint64_t kCount = (5u << 20) + 1234;
  const std::vector<uint8_t> wire = Int8(Normal(kCount, 6));
  const std::vector<uint8_t> decoded = BF16Bytes(Int8Decoded(wire));
  kernels::BlockSums sums;
  kernels::ReduceGradient({kernels::DType::kBF16, decoded.data(), kCount}, &sums);
  for (const size_t chunk_bytes : {kLeafBytes, 4 * kLeafBytes}) {
    World world;
    auto store = NewStore(&world, Layout({Parameter("w", {kCount}, v1::DTYPE_BF16)}, 1 << 26));
    ASSERT_TRUE(store->SetLayout(WholeLayout(store->layout())).ok());
    const uint64_t before = world.accountant.reserved_bytes(Tier::kDram);
    const absl::Status sent =
        Send(store->BeginGradient(0, 0, 0, v1::DTYPE_I8_BLOCK), wire, chunk_bytes);
    ASSERT_TRUE(sent.ok()) << sent;
    EXPECT_EQ(world.accountant.reserved_bytes(Tier::kDram), before);
    const StagedShard staged = StageGradient(store, 0).value();
    EXPECT_EQ(staged.digest, DigestOfBytes(decoded));
    EXPECT_EQ(staged.sum_squares, sums.sum_squares);
    EXPECT_TRUE(Send(store->BeginGradient(0, 0, 0, v1::DTYPE_I8_BLOCK), wire, chunk_bytes).ok());
    EXPECT_EQ(store->BeginGradient(0, 0, 0, v1::DTYPE_BF16).status().code(),
              absl::StatusCode::kAlreadyExists);
  }
}

// Slices and columns begin and end anywhere and cross shards. One of the pieces is sent as bf16.
TEST(Staging, DecodesInt8OfAnyBox) {
  World world;
  constexpr uint64_t kRows = 700, kColumns = 1000;
  const auto gradient = Normal(kRows * kColumns, 7);
  const std::vector<std::vector<Box>> layouts = {
      {Flat(0, 100'001), Flat(100'001, kRows * kColumns - 100'001)},
      {Rectangle({0, 0}, {kRows, 333}), Rectangle({0, 333}, {kRows, 667})},
  };
  for (const std::vector<Box>& boxes : layouts) {
    auto store =
        NewStore(&world, Layout({Parameter("w", {kRows, kColumns}, v1::DTYPE_BF16)}, 256 * 1024));
    std::vector<ExpectedPiece> pieces;
    for (const OwnedShard& shard : store->layout().shards)
      for (uint32_t rank = 0; rank < 2; ++rank)
        if (!BoxPart(boxes[rank], {kRows, kColumns}, shard.range).empty())
          pieces.push_back({shard.id, rank, 0, boxes[rank]});
    ASSERT_TRUE(store->SetLayout(pieces).ok());
    std::vector<uint16_t> expected(kRows * kColumns);
    for (const ExpectedPiece& piece : pieces) {
      const Range range = store->layout().shards[piece.shard].range;
      std::vector<float> part;
      ForEachRun(piece.box, {kRows, kColumns}, range, [&](Range run) {
        part.insert(part.end(), gradient.begin() + run.begin, gradient.begin() + run.end);
      });
      const std::vector<uint8_t> wire = Int8(part);
      const std::vector<uint16_t> decoded = Int8Decoded(wire);
      size_t at = 0;
      ForEachRun(piece.box, {kRows, kColumns}, range, [&](Range run) {
        for (uint64_t i = run.begin; i < run.end; ++i) expected[i] = decoded[at++];
      });
      const bool as_bf16 = piece.shard == 0 && piece.rank == 0;
      const absl::Status sent =
          Send(store->BeginGradient(piece.shard, piece.rank, 0,
                                    as_bf16 ? v1::DTYPE_BF16 : v1::DTYPE_I8_BLOCK),
               as_bf16 ? BF16Bytes(decoded) : wire);
      ASSERT_TRUE(sent.ok()) << sent;
    }
    for (const OwnedShard& shard : store->layout().shards) {
      const std::vector<uint16_t> part(expected.begin() + shard.range.begin,
                                       expected.begin() + shard.range.end);
      EXPECT_EQ(StageGradient(store, shard.id).value().digest, DigestOfBytes(BF16Bytes(part)));
    }
  }
}

TEST(Staging, SumsInt8InFp32) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {50'000})}, 1 << 20));
  ASSERT_TRUE(store->SetLayout(WholeLayout(store->layout(), 2)).ok());
  std::vector<float> sum(50'000, -0.0f);
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const std::vector<uint8_t> wire = Int8(Normal(50'000, 8 + rank));
    ASSERT_TRUE(Send(store->BeginGradient(0, rank, 0, v1::DTYPE_I8_BLOCK), wire).ok());
    const std::vector<uint16_t> decoded = Int8Decoded(wire);
    for (size_t i = 0; i < sum.size(); ++i)
      sum[i] += std::bit_cast<float>(uint32_t{decoded[i]} << 16);
  }
  EXPECT_EQ(StageGradient(store, 0).value().digest, DigestOfBytes(AsBytes(sum)));
}

TEST(Staging, Int8OfABadElementReachesTheVetoAndABadScaleIsRefused) {
  World world;
  auto store = NewStore(&world, Layout({Parameter("w", {5000})}, 1 << 20));
  ASSERT_TRUE(store->SetLayout(WholeLayout(store->layout())).ok());
  auto values = Normal(5000, 1);
  values[1000] = std::numeric_limits<float>::infinity();
  std::vector<uint8_t> wire = Int8(values);
  ASSERT_TRUE(Send(store->BeginGradient(0, 0, 0, v1::DTYPE_I8_BLOCK), wire).ok());
  EXPECT_EQ(StageGradient(store, 0).value().nonfinite_count, 256u);
  store->DropStaged();

  const float scale = -0.25f;
  std::memcpy(&wire[2 * kernels::kInt8BlockBytes], &scale, sizeof scale);
  const absl::Status refused = Send(store->BeginGradient(0, 0, 0, v1::DTYPE_I8_BLOCK), wire);
  EXPECT_TRUE(absl::IsInvalidArgument(refused));
  EXPECT_THAT(std::string(refused.message()),
              HasSubstr("tensor 'w', shard 0, rank 0, elements from 0 of the piece: the scale of "
                        "block 2 is -0.25; at least +0"));
  auto writer = store->BeginGradient(0, 0, 0, v1::DTYPE_I8_BLOCK).value();
  const absl::Span<const uint8_t> slices[] = {wire};  // the checksum below is wrong
  EXPECT_TRUE(absl::IsAborted(writer->WriteChunk(0, slices, 1)));
  writer.reset();

  wire.push_back(0);
  const absl::Status longer = Send(store->BeginGradient(0, 0, 0, v1::DTYPE_I8_BLOCK), wire);
  EXPECT_TRUE(absl::IsInvalidArgument(longer));
  EXPECT_THAT(std::string(longer.message()),
              HasSubstr("chunk of 5081 bytes at offset 0 of a piece of 5080"));
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
  const StagedShard staged = StageGradient(store, 0).value();
  EXPECT_EQ(staged.digest, DigestOfBytes(AsBytes(half)));
  EXPECT_EQ(staged.nonfinite_count, 2u);
  store->DropStaged();
  EXPECT_TRUE(StageGradient(store, 0).value().absent);
}

// A stager is made before its attempt is dropped, and runs when half of another attempt has
// arrived.
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
  EXPECT_EQ(StageGradient(store, 0).value().digest, DigestOfBytes(AsBytes(sum)));
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

// A push in a wider dtype than the manifest's needs memory that only a spill can free, and the disk
// hangs during that spill.
TEST(Staging, NobodyWaitsForAPushThatWaitsForTheDisk) {
  World world(8 * kMiB, 64 * kMiB);
  const OwnedShards layout = Layout({Parameter("w", {1024, 1024}, v1::DTYPE_BF16)}, 1 << 18);
  auto store = NewStore(&world, layout);
  auto configured = AllAdamW(layout);
  ASSERT_TRUE(store->Configure(configured).ok());
  LoadTensor(store.get(), 0, Normal(1 << 20, 1));
  CommitLoad(store.get(), 0);
  ASSERT_TRUE(store->SetLayout(WholeLayout(layout)).ok());
  const auto filler = world.accountant.Reserve({Tier::kDram, "other", "weight"},
                                               world.accountant.free_bytes(Tier::kDram));
  ASSERT_TRUE(filler.ok());
  world.disk.HangWrites();
  std::vector<std::unique_ptr<PieceWriter>> writers(layout.shards.size());
  std::thread push([&] {
    for (const OwnedShard& shard : layout.shards)
      writers[shard.id] = store->BeginGradient(shard.id, 0, 0, v1::DTYPE_F32).value_or(nullptr);
  });
  world.disk.AwaitHangingWrite();
  EXPECT_TRUE(store->Describe(0).ok());
  configured[0].state = kernels::StateFormat::kFp32;
  EXPECT_TRUE(absl::IsFailedPrecondition(store->Configure(configured)));
  store->DropStaged();
  EXPECT_TRUE(store->OpenRead({0, Slot::kWeight, v1::DTYPE_BF16, Flat(0, 100), 0}).ok());
  world.disk.Heal();
  push.join();
  for (const auto& writer : writers) EXPECT_NE(writer, nullptr);
}

// A new layout may be set while streams of the layout before still begin and end pieces.
TEST(Staging, ALayoutReplacesAnotherBesideItsStreams) {
  World world;
  const OwnedShards layout = Layout({Parameter("w", {64, 1000})}, 16'000);
  auto store = NewStore(&world, layout);
  const auto bytes = AsBytes(Normal(16'000, 1));
  std::atomic<bool> done = false;
  std::vector<std::thread> streams;
  streams.reserve(2);
  for (uint32_t rank = 0; rank < 2; ++rank)
    streams.emplace_back([&, rank] {
      while (!done)
        for (const OwnedShard& shard : layout.shards) {
          const absl::Status sent =
              Send(store->BeginGradient(shard.id, rank, 0, v1::DTYPE_F32), bytes);
          EXPECT_TRUE(sent.ok() || absl::IsInvalidArgument(sent) || absl::IsAborted(sent)) << sent;
          (void)StageGradient(store, shard.id);
        }
    });
  for (int round = 0; round < 50; ++round)
    ASSERT_TRUE(store->SetLayout(WholeLayout(layout, 1 + round % 2)).ok());
  done = true;
  for (std::thread& stream : streams) stream.join();
  ASSERT_TRUE(store->SetLayout(WholeLayout(layout)).ok());
  ASSERT_TRUE(Send(store->BeginGradient(0, 0, 0, v1::DTYPE_F32), bytes).ok());
  EXPECT_EQ(StageGradient(store, 0).value().digest, DigestOfBytes(bytes));
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
  // A layout that names a piece twice is refused, and the one before stays.
  EXPECT_TRUE(
      absl::IsInvalidArgument(store->SetLayout({{0, 3, 1, Flat(0, 2)}, {0, 3, 1, Flat(2, 2)}})));
  EXPECT_TRUE(store->BeginGradient(0, 0, 0, v1::DTYPE_F32).ok());
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
