// Flushes: a server writes the state of its shards of a job, all at one step, on a clean stop and
// when the leader asks for it. The next start, or a rollback, loads it.
//
// A flush has a small value, the head, and bulk values. The head names the index, and the index
// names the others, each with its size and XXH3-64. The head is written last, in one synced batch.
// A flush is therefore whole or does not exist. Which flushes are kept is decided by the step
// machines (step::Participant). To erase a flush reads none of its bytes, so that a damaged one
// affects neither later flushes nor other jobs.
//   Threads  Calls for different jobs may run at once. The caller makes one call at a time for a
//            job.
//   Disk     Every function waits for the disk.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/shards/shard_store.h"
#include "storage/store.h"

namespace orlop::server {

// What a flush is of, and strings that it keeps for its caller without reading them. Each string
// has at most 64 MiB.
struct FlushHeader {
  std::string job;
  int64_t step = 0;       // the version of every shard
  std::string manifest;   // v1::CreateJobRequest
  std::string optimizer;  // v1::ConfigureOptimizerRequest; empty: not configured
  std::string machine;    // step::ParticipantImage, serialized by server/job/step_codec.h
};

struct FlushInfo {
  int64_t step = 0;      // without meaning if damaged
  uint64_t serial = 0;   // a later flush of the job has a higher one
  bool damaged = false;  // the head is damaged; the index and the other values were not checked
};

// Writes all state of `shards` at header.step. No apply may be running. With `with_staged`, also
// writes staged pieces; then no push may be running either.
//   Status  FailedPrecondition (a shard is at another version), ResourceExhausted, DataLoss. After
//           an error the earlier flushes are as they were.
absl::Status WriteFlush(storage::Store* store, const FlushHeader& header, bool with_staged,
                        ShardStore* shards);

// Keeps the newest undamaged flush of each of these steps, and erases all others of the job.
//   Status  ResourceExhausted, DataLoss.
absl::Status KeepFlushes(storage::Store* store, const std::string& job,
                         const std::vector<int64_t>& steps);

// Gives the disk space of erased flushes of a job back to the file system now.
//   Status  ResourceExhausted, DataLoss.
absl::Status ReclaimFlushes(storage::Store* store, const std::string& job);

// Returns the flushes of a job, newest first, damaged ones included.
//   Status  DataLoss: the store cannot be read, or has a key that no flush writes.
absl::StatusOr<std::vector<FlushInfo>> ListFlushes(const storage::Store& store,
                                                   const std::string& job);

// Returns the header that WriteFlush was given.
//   Status  NotFound: there is no flush of that step. DataLoss: its index is damaged, or there is
//           no flush of that step but a damaged one, which may be it.
absl::StatusOr<FlushHeader> ReadFlushHeader(const storage::Store& store, const std::string& job,
                                            int64_t step);

// Replaces the state of `shards` by a flush: slots, versions and, if `with_staged`, staged pieces.
// A rollback does not want the staged pieces. `shards` must have been created and configured as
// when the flush was written; for staged pieces it must also have the same contribution layout.
// Every checksum is verified.
//   Status  NotFound and DataLoss as ReadFlushHeader; DataLoss also names tensor, shard and slot of
//           a damaged value. FailedPrecondition (other shards or formats), ResourceExhausted.
//           Cancelled: `is_cancelled`, which is asked before each shard, has returned true. After
//           an error `shards` has old and new state mixed and must be discarded.
absl::Status LoadFlush(const storage::Store& store, const std::string& job, int64_t step,
                       bool with_staged, ShardStore* shards,
                       const std::function<bool()>& is_cancelled = nullptr);

// Erases every flush of a job, and gives the disk space back. Status: ResourceExhausted, DataLoss.
absl::Status EraseFlushes(storage::Store* store, const std::string& job);

}  // namespace orlop::server
