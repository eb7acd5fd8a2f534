// What tests of shards share: a job, pushes in chunks, reads back.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/checksum.h"
#include "kernels/casts.h"
#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/shards/shard_store.h"
#include "storage/testing/faulty_store.h"
#include "storage/testing/memory_store.h"

namespace orlop::server {

inline constexpr uint64_t kMiB = 1 << 20;

template <typename T>
std::vector<uint8_t> AsBytes(const std::vector<T>& values) {
  std::vector<uint8_t> bytes(values.size() * sizeof(T));
  if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}
template <typename T>
std::vector<T> FromBytes(const std::vector<uint8_t>& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

inline std::vector<float> Normal(size_t count, uint32_t seed, float scale = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

inline Digest128 DigestOfBytes(const std::vector<uint8_t>& bytes) {
  PieceDigest digest;
  digest.AddLeaves(LeafHashes({reinterpret_cast<const char*>(bytes.data()), bytes.size()}));
  return digest.Finish();
}

// Sends a whole piece as a client would, in slices of odd sizes.
inline absl::Status Send(PieceWriter* writer, const std::vector<uint8_t>& bytes,
                         size_t chunk_bytes = kLeafBytes) {
  for (size_t at = 0; at < bytes.size(); at += chunk_bytes) {
    const absl::Span<const uint8_t> chunk = absl::MakeConstSpan(bytes).subspan(at, chunk_bytes);
    const uint64_t checksum =
        ChunkChecksum(LeafHashes({reinterpret_cast<const char*>(chunk.data()), chunk.size()}));
    const absl::Span<const uint8_t> slices[] = {
        chunk.subspan(0, 33'333), chunk.subspan(std::min<size_t>(chunk.size(), 33'333))};
    absl::Status status = writer->WriteChunk(at, slices, checksum);
    if (!status.ok()) return status;
  }
  auto finished = writer->Finish(DigestOfBytes(bytes));
  if (!finished.ok()) return finished.status();
  absl::Status kept = writer->Keep();
  writer->Settle();
  return kept;
}
inline absl::Status Send(absl::StatusOr<std::unique_ptr<PieceWriter>> writer,
                         const std::vector<uint8_t>& bytes, size_t chunk_bytes = kLeafBytes) {
  return writer.ok() ? Send(writer->get(), bytes, chunk_bytes) : writer.status();
}

// Tensors cut into shards, all held here.
inline OwnedShards Layout(std::vector<Tensor> tensors, uint64_t shard_elements) {
  OwnedShards layout{"job"};
  for (uint32_t t = 0; t < tensors.size(); ++t) {
    tensors[t].element_count = ElementCount(tensors[t].shape).value();
    for (uint64_t i = 0; i < ShardCount(tensors[t].element_count, shard_elements); ++i)
      layout.shards.push_back({static_cast<int32_t>(layout.shards.size()), t, i,
                               ShardRange(i, tensors[t].element_count, shard_elements)});
  }
  layout.tensors = std::move(tensors);
  return layout;
}

inline Tensor Parameter(const std::string& name, std::vector<uint64_t> shape,
                        v1::DType dtype = v1::DTYPE_F32) {
  return {name, true, std::move(shape), dtype};
}

inline Box Flat(uint64_t begin, uint64_t count) { return {{begin}, {count}, true}; }
inline Box Rectangle(std::vector<uint64_t> offset, std::vector<uint64_t> extent) {
  return {std::move(offset), std::move(extent), false};
}

struct World {
  explicit World(uint64_t dram_bytes = 256 * kMiB, uint64_t nvme_bytes = 0)
      : accountant({dram_bytes, nvme_bytes}), disk(storage::NewMemoryStore()) {
    auto free = [this]() -> absl::StatusOr<uint64_t> { return free_disk_bytes.load(); };
    tiers = Tiers::Create(&accountant, nvme_bytes > 0 ? &disk : nullptr, free).value();
  }
  Accountant accountant;
  std::atomic<uint64_t> free_disk_bytes =
      1ull << 40;  // what the disk says, whatever `accountant` has promised
  storage::FaultyStore disk;
  std::unique_ptr<Tiers> tiers;
};

inline std::unique_ptr<ShardStore> NewStore(World* world, OwnedShards layout) {
  auto store = ShardStore::Create(std::move(layout), world->tiers.get());
  EXPECT_TRUE(store.ok()) << store.status();
  return *std::move(store);
}

inline std::vector<uint8_t> Read(ShardStore* store, const ReadRequest& request) {
  auto reader = store->OpenRead(request);
  EXPECT_TRUE(reader.ok()) << reader.status();
  std::vector<uint8_t> bytes;
  if (!reader.ok()) return bytes;
  while (!(*reader)->done()) {
    auto chunk = (*reader)->Next();
    EXPECT_TRUE(chunk.ok()) << chunk.status();
    if (!chunk.ok()) return bytes;
    EXPECT_EQ(chunk->checksum,
              ChunkChecksum(LeafHashes(
                  {reinterpret_cast<const char*>(chunk->bytes.data()), chunk->bytes.size()})));
    bytes.insert(bytes.end(), chunk->bytes.begin(), chunk->bytes.end());
    if (chunk->digest) {
      EXPECT_EQ(*chunk->digest, DigestOfBytes(bytes));
    }
  }
  return bytes;
}

// `store` points to a ShardStore.
template <typename Store>
absl::StatusOr<StagedShard> StageGradient(const Store& store, int32_t shard) {
  return store->StagerOf(shard, /*is_load=*/false)();
}
template <typename Store>
absl::StatusOr<StagedShard> StageLoad(const Store& store, int32_t shard) {
  return store->StagerOf(shard, /*is_load=*/true)();
}
// Bytes at rest of all slots of a tensor, over the shards here.
template <typename Store>
uint64_t RestBytes(const Store& store, uint32_t tensor) {
  uint64_t bytes = 0;
  for (const OwnedShard& shard : store->layout().shards) {
    if (shard.tensor != tensor) continue;
    const ShardStatus status = store->Describe(shard.id).value();
    for (const SlotStatus& slot : status.slots) bytes += slot.bytes;
  }
  return bytes;
}

// Every stored byte of a job at one version, slots in order: what bit equality means.
inline std::vector<uint8_t> AllBytes(ShardStore* store, int64_t version) {
  std::vector<uint8_t> all;
  for (const OwnedShard& shard : store->layout().shards) {
    const ShardStatus status = store->Describe(shard.id).value();
    for (const SlotStatus& slot : status.slots) {
      const Box whole = WholeTensor(store->layout().tensors[shard.tensor].element_count);
      const auto bytes = Read(store, {shard.id, slot.slot, slot.dtype, whole, version});
      all.insert(all.end(), bytes.begin(), bytes.end());
    }
  }
  return all;
}

// fp32 values of one whole tensor into version `step`.
inline void LoadTensor(ShardStore* store, uint32_t tensor, const std::vector<float>& values,
                       Slot slot = Slot::kWeight) {
  for (const OwnedShard& shard : store->layout().shards) {
    if (shard.tensor != tensor) continue;
    const std::vector<float> part(values.begin() + shard.range.begin,
                                  values.begin() + shard.range.end);
    const Box box = {{shard.range.begin}, {shard.range.count()}, true};
    ASSERT_TRUE(Send(store->BeginLoad(shard.id, slot, v1::DTYPE_F32, box), AsBytes(part)).ok());
  }
}
inline void CommitLoad(ShardStore* store, int64_t step) {
  for (const OwnedShard& shard : store->layout().shards) {
    ASSERT_TRUE(StageLoad(store, shard.id).ok()) << StageLoad(store, shard.id).status();
    ASSERT_TRUE(store->Apply(shard.id, {ShardUpdate::Kind::kLoad, step}).ok());
  }
}

// One contributor that pushes every shard whole.
inline std::vector<ExpectedPiece> WholeLayout(const OwnedShards& layout, uint32_t rank_count = 1) {
  std::vector<ExpectedPiece> pieces;
  for (const OwnedShard& shard : layout.shards)
    for (uint32_t rank = 0; rank < rank_count; ++rank)
      pieces.push_back(
          {shard.id, rank, 0, WholeTensor(layout.tensors[shard.tensor].element_count)});
  return pieces;
}

inline void PushTensor(ShardStore* store, uint32_t tensor, uint32_t rank,
                       const std::vector<float>& gradient) {
  for (const OwnedShard& shard : store->layout().shards) {
    if (shard.tensor != tensor) continue;
    const std::vector<float> part(gradient.begin() + shard.range.begin,
                                  gradient.begin() + shard.range.end);
    const absl::Status sent =
        Send(store->BeginGradient(shard.id, rank, 0, v1::DTYPE_F32), AsBytes(part));
    ASSERT_TRUE(sent.ok()) << sent;
  }
}

inline kernels::StepScalars AdamW(int64_t applied_count) {
  return kernels::FindOptimizer("adamw")->Prepare({{1e-3, 0.9, 0.999, 1e-8, 1e-2}}, applied_count,
                                                  0.5f);
}

// Pushes one gradient per tensor and applies it as step `step` (updates before: step - 1).
inline void AdamWStep(ShardStore* store, int64_t step, uint32_t seed) {
  for (uint32_t t = 0; t < store->layout().tensors.size(); ++t)
    PushTensor(store, t, 0, Normal(store->layout().tensors[t].element_count, seed + t));
  for (const OwnedShard& shard : store->layout().shards) {
    ASSERT_TRUE(StageGradient(store, shard.id).ok());
    const absl::Status applied =
        store->Apply(shard.id, {ShardUpdate::Kind::kApply, step, false, AdamW(step - 1)});
    ASSERT_TRUE(applied.ok()) << applied;
  }
}

inline std::vector<TensorOptimizer> AllAdamW(const OwnedShards& layout) {
  std::vector<TensorOptimizer> optimizers;
  for (const Tensor& tensor : layout.tensors) {
    optimizers.emplace_back();
    if (!tensor.is_parameter) continue;
    optimizers.back().optimizer = kernels::FindOptimizer("adamw");
    optimizers.back().state = StateFormatOf(tensor, kernels::StateFormat::k8Bit, false);
  }
  return optimizers;
}

}  // namespace orlop::server
