// A state server: its data directory, memory, jobs and gRPC services.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/config.h"

namespace orlop::server {

class OrlopServer {
 public:
  // Starts a server. Returns once it answers calls and has opened every job that is on disk.
  // `options` must have passed Validate. Once `is_ending` is true (from any thread; null: never),
  // the start ends soon, with Cancelled, and leaves on the disk what was there.
  //   Status  Cancelled, Unavailable (the address or the data directory is in use),
  //           FailedPrecondition (the data directory belongs to another server, or a job to another
  //           list of peers), DataLoss, ResourceExhausted (--memory is too small for the jobs),
  //           InvalidArgument (a certificate or key cannot be read).
  static absl::StatusOr<std::unique_ptr<OrlopServer>> Start(
      const Options& options, const std::atomic<bool>* is_ending = nullptr);
  // Ends the server without a flush if Stop was not called. State in memory is then lost.
  virtual ~OrlopServer() = default;

  // Returns the address that it listens on: host:port with the actual port, or unix:/path.
  //   Threads  any; likewise ready().
  virtual const std::string& address() const = 0;
  // Returns whether every job that was on disk has reached a state other than RECOVERING and
  // WAITING (server/services/readiness.h). The health is SERVING from then on until Stop. Does not
  // become false again.
  virtual bool ready() const = 0;
  // Refuses new calls, completes decided steps, flushes every job and marks each flush as complete.
  // May take as long as the disk needs. A second call returns OK at once.
  //   Status  The first error of a job that could not be flushed: DeadlineExceeded (a decided step
  //           did not complete within a minute), ResourceExhausted or DataLoss. The other jobs are
  //           flushed all the same.
  virtual absl::Status Stop() = 0;
};

}  // namespace orlop::server
