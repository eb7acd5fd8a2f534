// The step-consistent write of a job's state on a clean stop, and its way back.
//
// Two flushes of a job are kept. A small value, the head, names bulk values, each with its size and
// XXH3-64; the head is written last, in one synced batch that also erases the oldest flush, so that
// a flush is whole or does not exist. A damaged one is its job's alone.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/shards/shard_store.h"
#include "storage/store.h"

namespace orlop::server {

// What the caller wants back with the shards: its own bytes, each at most 64 MiB.
struct FlushHeader {
  std::string job;
  int64_t step = 0;       // version of every shard
  std::string manifest;   // the job as created
  std::string optimizer;  // its configuration; empty: none yet
  std::string machine;    // the step machine's image: decisions, applied counts, attempt
};

struct FlushInfo {
  int64_t step = 0;      // not known if damaged
  uint64_t serial = 0;   // ascending in time
  bool damaged = false;  // its head cannot be read
};

inline constexpr int kKeptFlushes = 2;

// Writes all state of `shards`, staged pieces included. No apply and no stream may be running.
//   Status  FailedPrecondition (a shard is at another version), ResourceExhausted, DataLoss: the
//   flushes before stay.
absl::Status WriteFlush(storage::Store* store, const FlushHeader& header, ShardStore* shards);

// The flushes of a job, newest first. Status DataLoss (the store cannot be read).
absl::StatusOr<std::vector<FlushInfo>> ListFlushes(const storage::Store& store,
                                                   const std::string& job);

// Status NotFound (no flush of that step), DataLoss.
absl::StatusOr<FlushHeader> ReadFlushHeader(const storage::Store& store, const std::string& job,
                                            int64_t step);

// Loads slots, versions and staged pieces into a store that was created, configured and given the
// same contribution layout; what it held is dropped. Every value's checksum is verified.
// `with_staged` false: what was staged is left out (a rollback).
//   Status  NotFound, DataLoss (names tensor, shard, slot), FailedPrecondition (other shards or
//   formats), ResourceExhausted. After
//           an error the store holds a mixture: discard it.
absl::Status LoadFlush(const storage::Store& store, const std::string& job, int64_t step,
                       bool with_staged, ShardStore* shards);

// Erases every flush of a job.
absl::Status EraseFlushes(storage::Store* store, const std::string& job);

}  // namespace orlop::server
