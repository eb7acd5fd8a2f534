// The target of flushes: the head, the index, and what a shard is restored from.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "base/checksum.h"
#include "fuzz/model.h"
#include "fuzz/mutators.h"
#include "fuzz/target.h"
#include "orlop/v1/types.pb.h"
#include "server/durability/flush.h"
#include "server/durability/flush_codec.h"
#include "server/job/contributions.h"
#include "server/job/slots.h"
#include "server/shards/shard_store.h"
#include "server/shards/testing/shard_fixture.h"
#include "server/step/layout.h"
#include "storage/store.h"
#include "storage/testing/memory_store.h"

namespace orlop::fuzz {
namespace {

constexpr int64_t kStep = 1;
constexpr char kKey[] = "flush/job:0000000000000001";

// What was staged when the flush was written. In kDirect one rank pushes "w", in kSummed two do.
enum class Staged : uint8_t { kDirect, kSummed, kLoad };
constexpr size_t kStagedCount = 3;

std::vector<server::ExpectedPiece> Pieces(uint32_t ranks) {
  step::Layout layout;
  layout.by_rank.resize(ranks);
  for (auto& rank : layout.by_rank) rank = {{0, step::Mode::kSum, {WholeTensor(800)}}};
  return server::PiecesFor(Model(), Model().LayoutFor(0), layout);
}

std::unique_ptr<server::ShardStore> NewShards(server::World* world, Staged staged) {
  auto shards = server::ShardStore::Create(Model().LayoutFor(0), world->tiers.get()).value();
  Require(shards->Configure(Model().Optimizers()).ok(), "the shards are configured");
  Require(shards->SetLayout(Pieces(staged == Staged::kSummed ? 2 : 1)).ok(), "and laid out");
  return shards;
}

void LoadWeights(server::ShardStore* shards, bool only_w) {
  server::LoadTensor(shards, 0, std::vector<float>(800, 0.5f));
  if (only_w) return;
  server::LoadTensor(shards, 3, {1, 2});
  const absl::Status sent =
      server::Send(shards->BeginLoad(5, server::Slot::kWeight, v1::DTYPE_I64, WholeTensor(3)),
                   server::AsBytes(std::vector<int64_t>{1, 2, 3}));
  Require(sent.ok(), "the buffer is set", sent.ToString());
}

// Writes a flush to a store in memory.
std::unique_ptr<storage::Store> Written(Staged staged) {
  server::World world;
  auto shards = NewShards(&world, staged);
  LoadWeights(shards.get(), /*only_w=*/false);
  server::CommitLoad(shards.get(), 0);
  for (const server::OwnedShard& shard : shards->layout().shards)
    Require(shards->Apply(shard.id, {server::ShardUpdate::Kind::kSkip, kStep}).ok(), "a step");
  if (staged == Staged::kLoad) {
    LoadWeights(shards.get(), /*only_w=*/true);
    Require(server::StageLoad(shards, 1).ok(), "a LOAD is staged");
  } else {
    for (uint32_t rank = 0; rank < (staged == Staged::kSummed ? 2 : 1); ++rank)
      server::PushTensor(shards.get(), 0, rank, std::vector<float>(800, 0.25f));
    Require(server::StageGradient(shards, 1).ok(), "a gradient is staged");
  }
  auto store = storage::NewMemoryStore();
  const absl::Status written = server::WriteFlush(
      store.get(), {"job", kStep, "manifest", "optimizer", "machine"}, true, shards.get());
  Require(written.ok(), "a flush is written", written.ToString());
  return store;
}

const storage::Store& Base(Staged staged) {
  static const auto* const stores = [] {
    auto* made = new std::vector<std::unique_ptr<storage::Store>>;
    for (size_t i = 0; i < kStagedCount; ++i) made->push_back(Written(static_cast<Staged>(i)));
    return made;
  }();
  return *(*stores)[static_cast<size_t>(staged)];
}

// Returns a head that is right for an index of a step.
std::string HeadOf(const std::string& index, int64_t step = kStep) {
  server::Encoder head;
  head.Add(uint64_t{1})
      .Add(std::string("job"))
      .Add(static_cast<uint64_t>(step))
      .Add(static_cast<uint64_t>(index.size()))
      .Add(Checksum64(index.data(), index.size()));
  return head.Add(Checksum64(head.bytes().data(), head.bytes().size())).bytes();
}

// A disk with one flush, whose head and index are given. All other values are those of `base`.
class Disk : public storage::MemoryStore {
 public:
  Disk(const storage::Store& base, std::string key, std::string head, std::string index)
      : base_(base), key_(std::move(key)), head_(std::move(head)), index_(std::move(index)) {}

  absl::Status ReadBulk(const std::string& key, absl::Span<uint8_t> out) const override {
    if (!absl::EndsWith(key, "/index")) return base_.ReadBulk(key, out);
    if (out.size() != index_.size()) return absl::DataLossError("the index has another size");
    std::copy(index_.begin(), index_.end(), out.begin());
    return absl::OkStatus();
  }
  absl::StatusOr<std::vector<std::pair<std::string, std::string>>> Scan(
      const std::string&) const override {
    return std::vector<std::pair<std::string, std::string>>{{key_, head_}};
  }

 private:
  const storage::Store& base_;
  const std::string key_, head_, index_;
};

std::string IndexOf(Staged staged) {
  const storage::Store& base = Base(staged);
  const std::string bytes = base.Get(kKey).value();
  server::Decoder head(bytes);
  head.Number();
  head.String();
  head.Number();
  std::string index(head.Number(), '\0');
  const absl::Status read = base.ReadBulk(absl::StrCat(kKey, "/index"),
                                          {reinterpret_cast<uint8_t*>(index.data()), index.size()});
  Require(read.ok(), "the index is there");
  return index;
}

// Loads a flush, and stages and drops what it has staged.
void Restore(const Disk& disk, Staged staged, bool with_staged) {
  static auto* const world = new server::World();
  auto shards = NewShards(world, staged);
  if (!server::LoadFlush(disk, "job", kStep, with_staged, shards.get()).ok()) return;
  for (const server::OwnedShard& shard : shards->layout().shards)
    for (const bool is_load : {false, true}) (void)shards->StagerOf(shard.id, is_load)();
  storage::MemoryStore again;
  (void)server::WriteFlush(&again, {"job", kStep, "", "", ""}, true, shards.get());
}

// The first byte of an input: what was staged; 4: the flush is loaded without that; 8: the rest is
// a head; 16: the rest begins with the key of a head. Otherwise the rest is an index.
void RunFlush(Bytes input) {
  if (input.empty()) return;
  const auto staged = static_cast<Staged>(input[0] % 4 % kStagedCount);
  const std::string rest(AsText(input.subspan(1)));
  const bool is_head = (input[0] & 8) != 0, is_key = (input[0] & 16) != 0;
  const Disk disk(Base(staged), is_key ? absl::StrCat("flush/job:", rest.substr(0, 16)) : kKey,
                  is_head ? rest : HeadOf(rest), is_head ? "" : rest);
  (void)server::ListFlushes(disk, "job");
  (void)server::ReadFlushHeader(disk, "job", kStep);
  Restore(disk, staged, (input[0] & 4) == 0);
}

std::vector<std::string> FlushSeeds() {
  std::vector<std::string> seeds = {absl::StrCat("\x08", HeadOf("")), "\x10xyz",
                                    absl::StrCat("\x10", "0000000000000001"),
                                    absl::StrCat("\x08", HeadOf("", kStep + 1))};
  for (size_t i = 0; i < kStagedCount; ++i)
    for (const size_t flags : {0, 4})
      seeds.push_back(std::string(1, static_cast<char>(i + flags)) +
                      IndexOf(static_cast<Staged>(i)));
  return seeds;
}

}  // namespace

Target FlushTarget() {
  return {RunFlush,
          [](Bytes input, size_t max_size, uint32_t seed) {
            if (input.empty() || max_size < 2) return MutateBytes(AsText(input), max_size);
            const uint8_t flags = seed % 13 == 1 ? static_cast<uint8_t>(seed >> 8) & 31 : input[0];
            return std::string(1, static_cast<char>(flags)) +
                   MutateNumbers(AsText(input.subspan(1)), max_size - 1, seed);
          },
          FlushSeeds()};
}

}  // namespace orlop::fuzz
