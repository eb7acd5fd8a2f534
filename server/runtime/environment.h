// The parts of a server that all of its jobs use.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "orlop/v1/types.pb.h"
#include "server/cluster/peer_links.h"
#include "server/durability/flush_line.h"
#include "server/tiers/tier.h"
#include "storage/data_directory.h"

namespace orlop::server {

// Plain values; every job has a copy. The pointers are not owned, and outlive all jobs.
struct Environment {
  std::vector<std::string> server_names;  // of the cluster, sorted
  int self = 0;                           // index of this server in `server_names`
  storage::DataDirectory* data = nullptr;
  Tiers* tiers = nullptr;
  ThreadPool* pool = nullptr;  // sums, applies, flushes, small writes
  PeerLinks* peers = nullptr;
  std::function<v1::ServerInfo()> identity;  // this server as ListServers shows it; any thread
  int64_t flush_every_ms = 0;                // of a job that this server leads; 0: never
  bool accepts_rollback = false;             // to the newest flush, without an operator
  std::shared_ptr<FlushLine> flush_line = std::make_shared<FlushLine>();
  // True: the server is to end, so nothing more is to be opened. Null: never.
  const std::atomic<bool>* is_ending = nullptr;

  bool is_leader() const { return self == 0; }
  bool must_end() const { return is_ending != nullptr && *is_ending; }
};

}  // namespace orlop::server
