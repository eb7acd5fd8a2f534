// The server's side of one Pull call: it turns the regions of the request into chunks. It knows no
// transport, and does not wait: its caller sends the chunks, and asks for versions.
#pragma once

#include <cstdint>
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
  // `jobs` and `request` must outlive this object.
  PullStream(JobTable* jobs, const v1::PullRequest& request) : jobs_(jobs), request_(request) {}

  // What comes next.
  struct Next {
    enum class What : uint8_t {
      kChunk,    // send `header`, which has no payload, with the bytes of `chunk` as its payload
      kVersion,  // ask `job` for `version` of `shard`, and give the answer to Open
      kEnd,
    } what = What::kEnd;
    v1::Chunk header;
    ReadChunk chunk;
    int32_t shard = 0;
    int64_t version = 0;
  };
  // After an error the stream is over, but for ResourceExhausted: a later call goes on where this
  // one was. May wait for the disk.
  //   Status  as Data.Pull (data.proto)
  absl::StatusOr<Next> Advance();
  // Returns what reading the shard of the last kVersion takes (ShardStore::RoomToRead).
  uint64_t RoomBytes() const { return job_->shards().RoomToRead(Read()); }
  // Opens the shard of the last kVersion. The pin delays the apply of the shard until then; from
  // then on the stream holds the version's buffers, and an apply writes into fresh ones.
  //   Status  as Data.Pull (data.proto)
  absl::Status Open(const absl::StatusOr<JobRuntime::VersionPin>& pin);
  // Null before the first Advance.
  const std::shared_ptr<JobRuntime>& job() const { return job_; }

 private:
  absl::Status Start();
  absl::Status Check();
  absl::Status Explained(const absl::Status& status) const;
  absl::Status BeginRegion();
  bool FindShard();
  int32_t ShardId() const;
  ReadRequest Read() const;
  absl::StatusOr<Next> NextChunk();

  JobTable* const jobs_;
  const v1::PullRequest& request_;
  std::shared_ptr<JobRuntime> job_;
  std::shared_ptr<const JobModel> model_;
  StreamPlace place_;
  uint64_t chunk_bytes_ = 0;  // the largest payload
  int64_t version_ = 0;       // the version of all regions
  v1::StreamKey key_;         // sent with the first chunk
  bool key_sent_ = false;
  int region_index_ = 0;                 // of the request: the next to begin
  std::optional<Region> region_;         // under way
  uint64_t shard_ = 0;                   // of the tensor: the one under way, or the next
  bool found_shard_ = false;             // of the region
  std::unique_ptr<ShardReader> reader_;  // of the shard under way
  v1::Region filled_;                    // sent with the first chunk of the shard
};

}  // namespace orlop::server
