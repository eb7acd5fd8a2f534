// What a caller holds of a push that goes on while it works.
#pragma once

#include "absl/status/statusor.h"
#include "client/link/parts.h"

namespace orlop::client {

// A push under way. Threads: any; Wait may be called from several.
class PendingPush {
 public:
  virtual ~PendingPush() = default;  // waits: the caller's memory is free afterwards
  // Waits until every byte was answered for, or the push failed for good, and no byte of the
  // caller's memory is referenced. Errors as Session::Push.
  virtual absl::StatusOr<Transfer> Wait() = 0;
  virtual bool done() const = 0;  // Wait would return at once
  // Cancels pieces that have not been sent. Wait() then returns Cancelled, unless every piece had
  // already been sent.
  virtual void Cancel() = 0;
};

}  // namespace orlop::client
