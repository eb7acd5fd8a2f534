// Pulls over gRPC: fetch pieces of one version into the caller's memory and verify them.
#pragma once

#include "client/lanes/rounds.h"

namespace orlop::client {

// Fetches every piece of version `version` and blocks until all have arrived. Errors: as
// Session::Pull. Threads: any number of calls at once, each with its own pieces.
absl::StatusOr<Transfer> FetchAll(const DataDoor& door, int64_t version, std::vector<Piece> pieces,
                                  std::optional<Milliseconds> timeout);

}  // namespace orlop::client
