// The gRPC side of Session::Pull: Pull calls receive pieces as chunks, copy them into the caller's
// memory, and verify the checksum of each chunk and the digest of each piece.
#pragma once

#include "client/lanes/rounds.h"

namespace orlop::client {

// Fetches `pieces` at version `version` into Piece::data, which the caller owns, and blocks until
// all have arrived. After an error that memory may hold a part of the bytes. Absent `timeout`:
// DataDeadline (rounds.h) gives the limit. Returns version, number of pieces and payload bytes.
//   Status   as Session::Pull (client/session.h)
//   Threads  any number of calls at once, each with its own pieces
absl::StatusOr<Transfer> FetchAll(const DataDoor& door, int64_t version, std::vector<Piece> pieces,
                                  std::optional<Milliseconds> timeout);

}  // namespace orlop::client
