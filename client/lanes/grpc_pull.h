// Pulls: fetches pieces of one version into the caller's memory and verifies them.
#pragma once

#include "client/lanes/rounds.h"

namespace orlop::client {

// Fetches every piece of exactly this version. Blocks; threads: any, with pieces of its own.
absl::StatusOr<Transfer> FetchAll(const DataDoor& door, int64_t version, std::vector<Piece> pieces,
                                  std::optional<Milliseconds> timeout);

}  // namespace orlop::client
