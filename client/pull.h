// Pulls: fetches pieces of one version into the caller's memory and verifies them.
#pragma once

#include "client/rounds.h"

namespace orlop::client {

struct PullKey {
  std::optional<int64_t> version;  // absent: latest
};

// Fetches every piece. Transfer::version is the lowest version served. Blocks; threads: any, with
// pieces of its own.
absl::StatusOr<Transfer> FetchAll(const DataDoor& door, const PullKey& key,
                                  std::vector<Piece> pieces, std::optional<Milliseconds> timeout);

}  // namespace orlop::client
