// One pull, 2 of 4 (ARCHITECTURE.md); next: server/lanes/pull_stream.cc
#include "client/lanes/grpc_pull.h"

#include <grpcpp/support/sync_stream.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/checksum.h"
#include "client/lanes/pieces.h"
#include "client/lanes/rounds.h"
#include "client/link/link.h"
#include "client/link/parts.h"
#include "client/link/retry.h"
#include "orlop/v1/data.grpc.pb.h"  // IWYU pragma: keep (how gRPC serializes a PullRequest)
#include "orlop/v1/data.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/chunk.h"
#include "proto/limits.h"
#include "proto/status.h"

namespace orlop::client {
namespace {

// Bytes that one Pull call asks for. A connection makes two calls or more, so that all connections
// are used and a faster one takes more of the pieces.
constexpr size_t kLeastRequestBytes = 8 << 20, kMostRequestBytes = 64 << 20;

using Reader = grpc::ClientReader<grpc::ByteBuffer>;

absl::Status BadAnswer(const std::string& text) {
  return absl::DataLossError(absl::StrCat("answer of Pull: ", text));
}

absl::Status Damaged(std::string_view what, uint64_t actual, uint64_t expected) {
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::CHECKSUM);
  detail.set_actual(absl::StrCat(actual));
  detail.set_limit(absl::StrCat(expected));
  return MakeError(absl::StatusCode::kAborted,
                   absl::StrCat(std::string(what), " of the bytes received is ", actual,
                                "; the sender's is ", expected),
                   detail);
}

// Copies a payload to `to` and returns its leaf hashes. Each strip is hashed right after it is
// copied, while it is in the L1 cache.
std::vector<uint64_t> CopyAndHash(const std::vector<grpc::Slice>& payload, char* to) {
  constexpr size_t kStripBytes = 16 << 10;
  ChunkHasher hasher;
  for (const grpc::Slice& slice : payload) {
    const uint8_t* from = slice.begin();
    for (size_t left = slice.size(); left > 0;) {
      const size_t part = std::min(left, kStripBytes);
      hasher.Add(from, part);
      std::memcpy(to, from, part);
      to += part, from += part, left -= part;
    }
  }
  return hasher.Finish();
}

// Receives the pieces of one Pull call in the order of the request, and verifies them.
class Receiver {
 public:
  Receiver(int64_t version, const std::vector<Piece*>& pieces)
      : version_(version), pieces_(pieces) {}

  bool complete() const { return next_ == pieces_.size(); }
  Piece* current() const { return pieces_[std::min(next_, pieces_.size() - 1)]; }

  absl::Status Accept(const grpc::ByteBuffer& message) {
    absl::StatusOr<DecodedChunk> chunk = DecodeChunk(message);
    if (!chunk.ok()) return BadAnswer(std::string(chunk.status().message()));
    if (absl::Status status = CheckHeader(chunk->header); !status.ok()) return status;
    Piece* piece = pieces_[next_];
    if (chunk->header.offset_bytes() != received_bytes_ || chunk->payload_bytes == 0 ||
        chunk->payload_bytes > piece->bytes - received_bytes_)
      return BadAnswer(absl::StrCat(chunk->payload_bytes, " bytes at offset ",
                                    chunk->header.offset_bytes(), "; ", received_bytes_, " of ",
                                    piece->bytes, " have arrived"));
    const std::vector<uint64_t> leaves = CopyAndHash(chunk->payload, piece->data + received_bytes_);
    const uint64_t checksum = ChunkChecksum(leaves);
    if (checksum != chunk->header.checksum())
      return Damaged("checksum", checksum, chunk->header.checksum());
    digest_.AddLeaves(leaves);
    received_bytes_ += chunk->payload_bytes;
    return received_bytes_ == piece->bytes ? FinishPiece(chunk->header) : absl::OkStatus();
  }

 private:
  absl::Status CheckHeader(const v1::Chunk& header) {
    if (complete()) return BadAnswer("more pieces than asked");
    if (key_seen_ == header.has_key())
      return BadAnswer("the first message, and no other, carries a key");
    if (header.has_key() && header.key().step() != version_)
      return BadAnswer(
          absl::StrCat("version ", header.key().step(), " served; ", version_, " asked"));
    key_seen_ = true;
    const v1::Region& asked = pieces_[next_]->region;
    if ((received_bytes_ == 0) != header.has_region())
      return BadAnswer("the first chunk of a piece carries its region");
    if (header.has_region() &&
        (header.region().tensor() != asked.tensor() || header.region().shard() != asked.shard()))
      return BadAnswer(absl::StrCat("tensor ", header.region().tensor(), " shard ",
                                    header.region().shard(), " in place of ", asked.tensor(),
                                    " shard ", asked.shard()));
    return absl::OkStatus();
  }

  absl::Status FinishPiece(const v1::Chunk& header) {
    const Digest128 digest = digest_.Finish(),
                    sent = {header.piece_digest().high(), header.piece_digest().low()};
    if (digest != sent) return Damaged("digest", digest.low, sent.low);
    digest_ = PieceDigest();
    received_bytes_ = 0;
    pieces_[next_++]->done = true;
    return absl::OkStatus();
  }

  const int64_t version_;
  const std::vector<Piece*>& pieces_;
  size_t next_ = 0;
  // Bytes of pieces_[next_] that have arrived.
  size_t received_bytes_ = 0;
  PieceDigest digest_;
  bool key_seen_ = false;
};

v1::PullRequest RequestFor(const DataDoor& door, int64_t version, uint64_t epoch,
                           const std::vector<Piece*>& pieces) {
  v1::PullRequest request;
  request.set_job(door.job);
  request.set_version(version);
  request.set_epoch(epoch);
  request.set_max_chunk_bytes(door.link->options().chunk_bytes);
  for (const Piece* piece : pieces) *request.add_regions() = piece->region;
  return request;
}

// Makes one Pull call.
absl::Status Fetch(const DataDoor& door, int64_t version, const Connection& connection,
                   Receiver* receiver, const std::vector<Piece*>& pieces) {
  grpc::ClientContext context;
  context.set_deadline(SystemDeadline(connection.deadline));
  door.cancels->Add(&context);
  const grpc::internal::RpcMethod method(
      "/orlop.v1.Data/Pull", grpc::internal::RpcMethod::SERVER_STREAMING, connection.channel);
  std::unique_ptr<Reader> reader(grpc::internal::ClientReaderFactory<grpc::ByteBuffer>::Create(
      connection.channel.get(), method, &context,
      RequestFor(door, version, connection.epoch, pieces)));
  absl::Status fault;
  for (grpc::ByteBuffer message; fault.ok() && reader->Read(&message); message.Clear())
    fault = receiver->Accept(message);
  if (!fault.ok()) context.TryCancel();
  absl::Status status = FromGrpc(reader->Finish());
  door.cancels->Remove(&context);
  if (!fault.ok()) return fault;
  if (status.ok() && !receiver->complete())
    return BadAnswer("the stream ended before the last piece");
  return status;
}

size_t RequestBytes(const DataDoor& door, size_t total_bytes) {
  const size_t connections = std::max<size_t>(1, door.link->servers().size()) *
                             static_cast<size_t>(door.link->options().connections_per_server);
  return std::clamp(total_bytes / connections / 2, kLeastRequestBytes, kMostRequestBytes);
}

}  // namespace

absl::StatusOr<Transfer> FetchAll(const DataDoor& door, int64_t version, std::vector<Piece> pieces,
                                  std::optional<Milliseconds> timeout) {
  Transfer transfer{.version = version, .pieces = pieces.size()};
  std::vector<Piece*> pointers;
  for (Piece& piece : pieces) {
    transfer.bytes += piece.bytes;
    pointers.push_back(&piece);
  }
  if (pieces.empty()) return transfer;
  RoundsOptions rounds{.rpc = Rpc::kPull,
                       .deadline = DataDeadline(door.link->options(), timeout, transfer.bytes)};
  const size_t request_bytes = RequestBytes(door, transfer.bytes);
  rounds.move = [&](const Connection& connection, WorkList* list) {
    while (true) {
      const std::vector<Piece*> taken = list->Take(kMaxRegionsPerPull, request_bytes);
      if (taken.empty()) return absl::OkStatus();
      Receiver receiver(version, taken);
      const absl::Status status = Fetch(door, version, connection, &receiver, taken);
      if (!status.ok()) return AtPiece(status, connection, *receiver.current());
    }
  };
  if (absl::Status status = MoveAll(door, pointers, rounds); !status.ok()) return status;
  return transfer;
}

}  // namespace orlop::client
