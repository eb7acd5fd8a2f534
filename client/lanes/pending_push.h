// The handle of a push that runs while its caller works.
#pragma once

#include "absl/status/statusor.h"
#include "client/link/parts.h"

namespace orlop::client {

// A push that has been started. Threads: any; several threads may call Wait.
class PendingPush {
 public:
  // Waits for the push. Afterwards nothing references the caller's memory.
  virtual ~PendingPush() = default;
  // Waits until every piece is stored or the push has failed, and nothing references the caller's
  // memory any more. Errors as Session::Push.
  virtual absl::StatusOr<Transfer> Wait() = 0;
  // True if Wait would return at once.
  virtual bool done() const = 0;
  // Cancels pieces that have not been sent. Wait() then returns Cancelled, unless every piece had
  // already been sent.
  virtual void Cancel() = 0;
};

}  // namespace orlop::client
