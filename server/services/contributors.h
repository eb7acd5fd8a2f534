// Whose each rank of a job is: only the caller who has joined as a rank may commit or abort for it.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "base/mutex.h"

namespace orlop::server {

// Callers are names of identities (server/services/roles.h): two processes with one certificate are
// one caller here. The step machine tells such processes apart, by their client_id. Nothing is
// stored: after a restart, a rank is anybody's until it joins again.
//   Threads  any
class Contributors {
 public:
  // `caller` has joined. The two newest generations of a job are remembered.
  void Joined(const std::string& job, uint64_t generation, uint32_t rank,
              const std::string& caller);
  // Returns OK if `caller` has joined as the rank, or nobody has.
  //   Status  PermissionDenied (DENIED): another caller has
  absl::Status Check(const std::string& job, uint64_t generation, uint32_t rank,
                     const std::string& caller) const;
  void Forget(const std::string& job);

 private:
  using Ranks = std::map<uint32_t, std::string>;  // callers
  mutable Mutex mutex_;
  std::map<std::string, std::map<uint64_t, Ranks>> jobs_ GUARDED_BY(mutex_);  // by generation
};

}  // namespace orlop::server
