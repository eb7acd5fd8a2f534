// Every limit of the wire, in one table. Checked before anything is allocated; tests read these
// constants. kMaxDimensions and kMaxTensorElements stand in base/box.h, kLeafBytes in
// base/checksum.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/box.h"
#include "base/checksum.h"

namespace orlop {

inline constexpr size_t kDefaultChunkBytes =
    1 << 20;  // what a client with default gRPC settings receives
inline constexpr size_t kMaxChunkBytes = 4 << 20;  // payload of one message
inline constexpr size_t kMaxMessageBytes =
    kMaxChunkBytes + (64 << 10);  // one data-plane message with its header
inline constexpr size_t kMaxControlMessageBytes =
    4 << 20;  // one control-plane message; longer lists are paged
inline constexpr size_t kMaxPeerMessageBytes = 64 << 20;  // between servers only
inline constexpr int kHttp2FrameBytes =
    1 << 20;  // 1 MiB frames carry pushes fastest (orlop bench wire)

inline constexpr size_t kMaxNameBytes = 256;
inline constexpr size_t kMaxTensors = 1 << 20;
inline constexpr size_t kMaxTiedNames = 16;
inline constexpr size_t kMaxJobs = 1024;
inline constexpr uint64_t kDefaultShardElements = uint64_t{1} << 22;
inline constexpr uint64_t kMinShardElements = 256;
inline constexpr uint64_t kMaxShardElements = uint64_t{1} << 26;
inline constexpr size_t kMaxShards = 1 << 20;  // of one job; every server knows them all

inline constexpr size_t kMaxGroups = 1024;
inline constexpr size_t kMaxBoxesPerTensor = 4096;  // of one contributor
inline constexpr uint32_t kMaxWorldSize =
    512;  // a waiting Join or CommitStep has a thread of its own: half of them, so that pushes and
          // pulls have the others
inline constexpr size_t kMaxClientIdBytes = 64;
inline constexpr size_t kMaxReasonBytes = 256;
inline constexpr size_t kMaxRegionsPerPull = 4096;
inline constexpr size_t kMaxPiecesPerPage = 4096;  // QueryPush
inline constexpr size_t kMaxPlacementRunsPerPage = 4096;
inline constexpr size_t kMaxTensorsPerPage = 1024;  // ListTensors; GetManifest: 4 times as many
inline constexpr size_t kMaxShardsPerPage = 1024;   // DescribeTensor
inline constexpr uint64_t kMaxAppliedCount = uint64_t{1} << 53;
inline constexpr uint32_t kMaxHoldMs = 600'000;
// A loss scale and its inverse are normal fp32 numbers: gradients are multiplied by the inverse.
inline constexpr double kMinLossScale = 0x1p-126, kMaxLossScale = 0x1p126;
inline constexpr int kMaxStallMs = 60'000;  // a pull whose caller takes nothing for so long ends
inline constexpr int kMaxManifestPageAgeSeconds = 60;
inline constexpr size_t kMaxUnfinishedLists =
    4 * kMaxWorldSize;                          // manifests, layouts: paged, not whole
inline constexpr int kMaxPullPinMs = 1000;      // how long a pull may delay the apply of its shard
inline constexpr int kMaxServerThreads = 1024;  // one per RPC in progress
inline constexpr size_t kMaxServers = 1024;     // of one cluster

}  // namespace orlop
