// The server's side of one Pull call: it turns the regions of the request into chunks. It knows no
// transport: its caller sends the chunks.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "orlop/v1/data.pb.h"
#include "server/lanes/region.h"
#include "server/runtime/job_table.h"
#include "server/shards/shard_store.h"

namespace orlop::server {

// Sends the regions in the order of the request, and the shards of each region in ascending order.
// Shards of other servers are left out.
//   Threads  not thread-safe: one call owns it.
class PullStream {
 public:
  // Sends one message: `header`, which has no payload, and the bytes of `chunk` as its payload. May
  // block. Run ends with the error that it returns.
  using Sink = std::function<absl::Status(v1::Chunk* header, const ReadChunk& chunk)>;

  // `jobs` and `request` must outlive this object. `wait`: how long versions are waited for.
  PullStream(JobTable* jobs, const v1::PullRequest& request, Wait wait, Sink sink)
      : jobs_(jobs), request_(request), wait_(std::move(wait)), sink_(std::move(sink)) {}

  // Sends all that was asked for. Called once. Status as Data.Pull (data.proto), or the sink's.
  absl::Status Run();

 private:
  absl::Status SendAll();
  absl::Status Check();
  absl::Status SendRegion(const v1::Region& region);
  absl::Status SendShard(int32_t id, const Region& region, v1::Region filled);
  absl::StatusOr<std::unique_ptr<ShardReader>> OpenPinned(const ReadRequest& request);

  JobTable* const jobs_;
  const v1::PullRequest& request_;
  const Wait wait_;
  const Sink sink_;
  std::shared_ptr<JobRuntime> job_;
  std::shared_ptr<const JobModel> model_;
  StreamPlace place_;
  uint64_t chunk_bytes_ = 0;  // the largest payload
  int64_t version_ = 0;       // the version of all regions
  v1::StreamKey key_;         // sent with the first chunk
  bool key_sent_ = false;
};

}  // namespace orlop::server
