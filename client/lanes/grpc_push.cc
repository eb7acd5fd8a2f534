// One push, 2 of 8 (ARCHITECTURE.md); next: server/lanes/push_stream.cc
// One Push or SetState stream. Pieces are sent as chunks of two slices, a header and the payload;
// the payload is never copied, and every byte is hashed once.
#include <grpcpp/impl/codegen/client_context.h>
#include <grpcpp/support/sync_stream.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "base/checksum.h"
#include "base/mutex.h"
#include "client/lanes/pieces.h"
#include "client/lanes/push_queue.h"
#include "client/lanes/rounds.h"
#include "client/link/link.h"
#include "client/link/manifest.h"
#include "orlop/v1/data.grpc.pb.h"
#include "orlop/v1/data.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/chunk.h"
#include "proto/convert.h"
#include "proto/status.h"

namespace orlop::client {
namespace {

// Counts the slices of the caller's memory that gRPC still references.
class SliceLatch {
 public:
  grpc::Slice Lend(char* data, size_t bytes) {
    {
      MutexLock lock(&mutex_);
      ++held_;
    }
    return grpc::Slice(data, bytes, &SliceLatch::Released, this);
  }
  void WaitUntilFree() {
    MutexLock lock(&mutex_);
    while (held_ > 0) released_.Wait(&mutex_);
  }

 private:
  static void Released(void* self) {
    auto* latch = static_cast<SliceLatch*>(self);
    MutexLock lock(&latch->mutex_);
    if (--latch->held_ == 0) latch->released_.SignalAll();
  }
  Mutex mutex_;
  CondVar released_;
  int held_ GUARDED_BY(mutex_) = 0;
};

using Writer = grpc::ClientWriter<grpc::ByteBuffer>;

v1::StreamKey ToProto(const PushKey& key, const std::string& job, uint64_t epoch) {
  v1::StreamKey proto;
  proto.set_job(job);
  proto.set_epoch(epoch);
  proto.set_generation(key.generation);
  proto.set_step(key.step);
  proto.set_attempt(key.attempt);
  proto.set_rank(key.rank);
  proto.set_loss_scale(key.loss_scale);
  return proto;
}

// Writes the chunks of `piece`. Returns false if the stream broke.
bool WritePiece(Piece* piece, size_t chunk_bytes, const v1::StreamKey* key, SliceLatch* latch,
                Writer* writer) {
  PieceDigest digest;
  for (size_t offset = 0; offset < piece->bytes; offset += chunk_bytes) {
    const size_t bytes = std::min(chunk_bytes, piece->bytes - offset);
    const std::vector<uint64_t> leaves = LeafHashes({piece->data + offset, bytes});
    digest.AddLeaves(leaves);
    v1::Chunk header;
    if (key != nullptr && offset == 0) *header.mutable_key() = *key;
    if (offset == 0) {
      *header.mutable_region() = piece->region;
      if (piece->applied_count) header.set_applied_count(*piece->applied_count);
    }
    header.set_offset_bytes(offset);
    header.set_checksum(ChunkChecksum(leaves));
    if (offset + bytes == piece->bytes) {
      piece->digest = digest.Finish();
      header.mutable_piece_digest()->set_high(piece->digest->high);
      header.mutable_piece_digest()->set_low(piece->digest->low);
    }
    if (!writer->Write(EncodeChunk(header, latch->Lend(piece->data + offset, bytes)))) return false;
  }
  return true;
}

std::unique_ptr<Writer> OpenStream(const Connection& connection, bool set_state,
                                   grpc::ClientContext* context, v1::PushResponse* response) {
  const char* name = set_state ? "/orlop.v1.Data/SetState" : "/orlop.v1.Data/Push";
  return std::unique_ptr<Writer>(grpc::internal::ClientWriterFactory<grpc::ByteBuffer>::Create(
      connection.channel.get(),
      grpc::internal::RpcMethod(name, grpc::internal::RpcMethod::CLIENT_STREAMING,
                                connection.channel),
      context, response));
}

absl::Status CheckResponse(const v1::PushResponse& response, size_t sent) {
  if (response.piece_count() == sent) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("server stored ", response.piece_count(), " of ", sent, " pieces"));
}

// Identifies a region. Client and server may write the same box differently, so the box is in its
// simplest form.
using RegionKey = std::tuple<std::string, uint64_t, std::string, Box>;

RegionKey KeyOf(const v1::Region& region, uint32_t tensor, const Manifest& manifest) {
  const auto& shape = manifest.tensor(tensor).shape();
  const Box box =
      region.has_box() ? FromWire(region.box()) : WholeTensor(manifest.element_count(tensor));
  return {region.tensor(), region.shard(), region.slot().empty() ? "gradient" : region.slot(),
          Simplified(box, {shape.begin(), shape.end()})};
}

// Opens a stream, writes `piece` and all that is left in the list, and returns the server's answer.
absl::Status RunStream(const DataDoor& door, const PushKey& key, const Connection& connection,
                       Piece* piece, WorkList* list, SliceLatch* latch, std::vector<Piece*>* sent) {
  grpc::ClientContext context;
  context.set_deadline(SystemDeadline(connection.deadline));
  door.cancels->Add(&context);
  v1::PushResponse response;
  std::unique_ptr<Writer> writer = OpenStream(connection, key.set_state, &context, &response);
  const v1::StreamKey stream_key = ToProto(key, door.job, connection.epoch);
  const size_t chunk_bytes = door.link->options().chunk_bytes;
  while (piece != nullptr) {
    const v1::StreamKey* opening = sent->empty() ? &stream_key : nullptr;
    sent->push_back(piece);
    if (!WritePiece(piece, chunk_bytes, opening, latch, writer.get())) break;
    const std::vector<Piece*> next = list->Take(1, 1);
    piece = next.empty() ? nullptr : next[0];
  }
  writer->WritesDone();
  const absl::Status status = FromGrpc(writer->Finish());
  door.cancels->Remove(&context);
  return status.ok() ? CheckResponse(response, sent->size()) : status;
}

}  // namespace

absl::Status SendStream(const DataDoor& door, const PushKey& key, const Connection& connection,
                        WorkList* list) {
  std::vector<Piece*> first = list->Take(1, 1), sent;
  if (first.empty()) return absl::OkStatus();
  SliceLatch latch;
  // RunStream has destroyed the call by now. It must: a cancelled gRPC call keeps its unsent slices
  // until it is destroyed, so waiting earlier would deadlock.
  const absl::Status status = RunStream(door, key, connection, first[0], list, &latch, &sent);
  latch.WaitUntilFree();
  if (!status.ok()) return AtPiece(status, connection, *sent.back());
  for (Piece* piece : sent) piece->done = true;
  return absl::OkStatus();
}

absl::Status FindStored(const DataDoor& door, const PushKey& key, const Connection& connection,
                        const std::vector<Piece*>& pieces) {
  std::map<RegionKey, Piece*> hashed;
  for (Piece* piece : pieces)
    if (piece->digest) hashed[KeyOf(piece->region, piece->tensor, *door.manifest)] = piece;
  if (hashed.empty()) return absl::OkStatus();
  v1::QueryPushRequest request;
  *request.mutable_key() = ToProto(key, door.job, connection.epoch);
  auto stub = v1::Data::NewStub(connection.channel);
  do {
    grpc::ClientContext context;
    context.set_deadline(SystemDeadline(connection.deadline));
    v1::QueryPushResponse response;
    const absl::Status status = FromGrpc(stub->QueryPush(&context, request, &response));
    if (!status.ok()) return AtPiece(status, connection, *pieces[0]);
    for (const v1::StoredPiece& stored : response.pieces()) {
      const absl::StatusOr<uint32_t> tensor = door.manifest->Find(stored.region().tensor());
      if (!tensor.ok()) continue;
      const auto found = hashed.find(KeyOf(stored.region(), *tensor, *door.manifest));
      if (found != hashed.end() &&
          *found->second->digest == Digest128{stored.digest().high(), stored.digest().low()})
        found->second->done = true;
    }
    request.set_after(response.next());
  } while (request.after() != 0);
  return absl::OkStatus();
}

}  // namespace orlop::client
