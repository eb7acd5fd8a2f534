// Helpers for tests of ShardStore: they make a small job, push and load its tensors in chunks,
// apply steps, and read slots back. Functions that return no status fail the test on an error.
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

// AsBytes and FromBytes copy the memory of the values, in host byte order.
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

// Returns values of the normal distribution with mean 0 and standard deviation `scale`.
inline std::vector<float> Normal(size_t count, uint32_t seed, float scale = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// Returns the digest of a piece with these bytes (types.proto, Digest).
inline Digest128 DigestOfBytes(const std::vector<uint8_t>& bytes) {
  PieceDigest digest;
  digest.AddLeaves(LeafHashes({reinterpret_cast<const char*>(bytes.data()), bytes.size()}));
  return digest.Finish();
}

// Writes all bytes of a piece in chunks of `chunk_bytes` (whole leaves of 1 MiB), then finishes and
// keeps it, as a push does. Each chunk is given as two slices, of which the first has 33,333 bytes,
// so that slices end inside elements.
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

// Returns a job of these tensors, cut into shards, in which this server owns every shard. Sets
// their element_count.
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

// Returns a parameter. Its element_count is 0 until Layout sets it.
inline Tensor Parameter(const std::string& name, std::vector<uint64_t> shape,
                        v1::DType dtype = v1::DTYPE_F32) {
  return {name, true, std::move(shape), dtype};
}

// Flat returns a range of flattened elements, Rectangle an N-d box.
inline Box Flat(uint64_t begin, uint64_t count) { return {{begin}, {count}, true}; }
inline Box Rectangle(std::vector<uint64_t> offset, std::vector<uint64_t> extent) {
  return {std::move(offset), std::move(extent), false};
}

// The memory and disk of one server: an accountant, a disk that can be made to fail, and the tiers
// over both. Slots can spill only if `nvme_bytes` > 0. It must outlive the stores made in it.
struct World {
  explicit World(uint64_t dram_bytes = 256 * kMiB, uint64_t nvme_bytes = 0)
      : accountant({dram_bytes, nvme_bytes}), disk(storage::NewMemoryStore()) {
    auto free = [this]() -> absl::StatusOr<uint64_t> { return free_disk_bytes.load(); };
    tiers = Tiers::Create(&accountant, nvme_bytes > 0 ? &disk : nullptr, free).value();
  }
  Accountant accountant;
  // The free bytes that the disk reports. They are independent of the accountant's reservations.
  std::atomic<uint64_t> free_disk_bytes = 1ull << 40;
  storage::FaultyStore disk;
  std::unique_ptr<Tiers> tiers;
};

inline std::unique_ptr<ShardStore> NewStore(World* world, OwnedShards layout) {
  auto store = ShardStore::Create(std::move(layout), world->tiers.get());
  EXPECT_TRUE(store.ok()) << store.status();
  return *std::move(store);
}

// Returns all bytes of one read, and checks the checksum of every chunk and the digest of the
// piece. After an error it returns the bytes read so far.
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

// StageGradient and StageLoad run the stager of one shard at once. `Store` is a pointer to a
// ShardStore, plain or smart.
template <typename Store>
absl::StatusOr<StagedShard> StageGradient(const Store& store, int32_t shard) {
  return store->StagerOf(shard, /*is_load=*/false)();
}
template <typename Store>
absl::StatusOr<StagedShard> StageLoad(const Store& store, int32_t shard) {
  return store->StagerOf(shard, /*is_load=*/true)();
}
// Returns the stored bytes of all slots of a tensor, in memory and on disk, summed over its shards.
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

// Returns every stored byte of a job at one version: shard by shard, and the slots of each in
// order. Two jobs are equal bit for bit if these bytes are equal.
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

// LoadTensor sets one slot of a whole tensor to fp32 values, as pieces of a LOAD, one for each
// shard. CommitLoad then stages the LOAD on every shard and applies it as step `step`.
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
// Stages and applies what was sent to all shards, as version `step`.
inline void CommitLoad(ShardStore* store, int64_t step) {
  for (const OwnedShard& shard : store->layout().shards) {
    ASSERT_TRUE(StageLoad(store, shard.id).ok()) << StageLoad(store, shard.id).status();
    ASSERT_TRUE(store->Apply(shard.id, {ShardUpdate::Kind::kLoad, step}).ok());
  }
}

// Returns the pieces of a contribution layout in which each of `rank_count` ranks pushes every
// tensor whole.
inline std::vector<ExpectedPiece> WholeLayout(const OwnedShards& layout, uint32_t rank_count = 1) {
  std::vector<ExpectedPiece> pieces;
  for (const OwnedShard& shard : layout.shards)
    for (uint32_t rank = 0; rank < rank_count; ++rank)
      pieces.push_back(
          {shard.id, rank, 0, WholeTensor(layout.tensors[shard.tensor].element_count)});
  return pieces;
}

// Pushes the fp32 gradient of one whole tensor as rank `rank`, one piece for each shard.
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

// Returns the scalars of an AdamW step after `applied_count` updates, with gradient scale 0.5.
inline kernels::StepScalars AdamW(int64_t applied_count) {
  return kernels::FindOptimizer("adamw")->Prepare({{1e-3, 0.9, 0.999, 1e-8, 1e-2}}, applied_count,
                                                  0.5f);
}

// Pushes one random gradient for each tensor as rank 0 and applies it as step `step`. Step 0 must
// have been a LOAD and every step since an update, so the tensors have had step - 1 updates.
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

// Returns a configuration for ShardStore::Configure: AdamW with 8-bit state for every parameter.
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
