// The whole server: data directory, memory, jobs and gRPC services, started and stopped in order.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/config.h"

namespace orlop::server {

class OrlopServer {
 public:
  // Starts and returns once calls are answered and jobs are back in memory.
  //   Status  Unavailable (address or data directory in use), FailedPrecondition (data directory of
  //   another server), DataLoss,
  //           ResourceExhausted (--memory is too small for the jobs here), InvalidArgument
  //           (certificates).
  static absl::StatusOr<std::unique_ptr<OrlopServer>> Start(const Options& options);
  virtual ~OrlopServer() = default;

  // Where it listens: host:port with the port that was chosen, or unix:/path.
  virtual const std::string& address() const = 0;
  // Whether health is SERVING: every job that was on disk has come to an answer
  // (server/services/readiness.h). It stays so until the stop.
  virtual bool ready() const = 0;
  // Graceful stop: refuses new calls, finishes what is decided, flushes everything, marks the
  // directory clean. OK only then.
  virtual absl::Status Stop() = 0;
};

}  // namespace orlop::server
