// One Pull: from its regions to chunks, without a transport.
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

// Sends regions in the order asked, and the shards of each in ascending order. Not thread-safe: one
// call owns it.
class PullStream {
 public:
  // Sends one message: `header` without its payload, and the chunk whose bytes are the payload. An
  // error ends the stream.
  using Sink = std::function<absl::Status(v1::Chunk* header, const ReadChunk& chunk)>;

  // `jobs` and `request` outlive it.
  PullStream(JobTable* jobs, const v1::PullRequest& request, Wait wait, Sink sink)
      : jobs_(jobs), request_(request), wait_(std::move(wait)), sink_(std::move(sink)) {}

  // Statuses as Data.Pull.
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
  uint64_t chunk_bytes_ = 0;
  int64_t version_ = 0;
  v1::StreamKey key_;
  bool key_sent_ = false;
};

}  // namespace orlop::server
