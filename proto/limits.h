// Every limit of the wire, in one table. A server checks them before it allocates anything; tests
// read these constants. kMaxDimensions and kMaxTensorElements are in base/box.h, kLeafBytes in
// base/checksum.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/box.h"
#include "base/checksum.h"

namespace orlop {

// Payload that fits the default receive limit of a gRPC client.
inline constexpr size_t kDefaultChunkBytes = 1 << 20;
// Largest payload of one message.
inline constexpr size_t kMaxChunkBytes = 4 << 20;
// Largest data-plane message: a payload and its header.
inline constexpr size_t kMaxMessageBytes = kMaxChunkBytes + (64 << 10);
// Largest control-plane message. Longer lists are paged.
inline constexpr size_t kMaxControlMessageBytes = 4 << 20;
// Largest message between servers.
inline constexpr size_t kMaxPeerMessageBytes = 64 << 20;
// Frames of 1 MiB carry pushes fastest (orlop bench wire).
inline constexpr int kHttp2FrameBytes = 1 << 20;

inline constexpr size_t kMaxNameBytes = 256;
// Of an error's message. gRPC takes 8 KiB of trailers, where a message may have three times its
// bytes.
inline constexpr size_t kMaxErrorMessageBytes = 1536;
inline constexpr size_t kMaxTensors = 1 << 20;
inline constexpr size_t kMaxTiedNames = 16;
inline constexpr size_t kMaxValueDigestBytes = 64;
inline constexpr size_t kMaxJobs = 1024;
inline constexpr uint64_t kDefaultShardElements = uint64_t{1} << 22;
inline constexpr uint64_t kMinShardElements = 256;
inline constexpr uint64_t kMaxShardElements = uint64_t{1} << 26;
// Limit per job, because every server knows all shards of a job.
inline constexpr size_t kMaxShards = 1 << 20;

inline constexpr size_t kMaxGroups = 1024;
// Limit per contributor.
inline constexpr size_t kMaxBoxesPerTensor = 4096;
inline constexpr uint32_t kMaxWorldSize = 512;  // contributors of a job
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
// A pull ends if its caller takes nothing for this time, a push if its caller sends nothing.
inline constexpr int kMaxStallMs = 60'000;
// The same, for one chunk of a pull while others were refused the memory in which it is built.
inline constexpr int kWantedStallMs = 5'000;
// A call ends if its request has not come within this time.
inline constexpr int kMaxRequestMs = 10'000;
inline constexpr int kMaxManifestPageAgeSeconds = 60;
// Limit on manifests and layouts of which some pages have not arrived.
inline constexpr size_t kMaxUnfinishedLists = size_t{4} * kMaxWorldSize;
inline constexpr int kMaxServerThreads = 8;  // of gRPC's own services: health and reflection
// Of control calls in progress at one door. A call that waits holds no thread.
inline constexpr int kMaxCalls = 8 * kMaxWorldSize;
inline constexpr size_t kMaxServers = 1024;  // of one cluster

}  // namespace orlop
