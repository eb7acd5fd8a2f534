#include "server/services/data_service.h"

#include <grpcpp/support/method_handler.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "orlop/v1/data.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/chunk.h"
#include "proto/convert.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/job/job_model.h"
#include "server/job/slots.h"
#include "server/lanes/pull_stream.h"
#include "server/lanes/push_stream.h"
#include "server/lanes/region.h"
#include "server/lanes/stall_watch.h"
#include "server/memory/accountant.h"
#include "server/memory/message_room.h"
#include "server/runtime/answers.h"
#include "server/runtime/job_table.h"
#include "server/runtime/wait.h"
#include "server/shards/shard_store.h"
#include "server/step/actions.h"
#include "server/step/layout.h"
#include "server/step/messages.h"
#include "server/step/participant.h"

namespace orlop::server {
namespace {

using grpc::ByteBuffer;

// Returns a slice of the chunk's memory. The slice keeps the memory alive until gRPC has sent it.
grpc::Slice SliceOf(const ReadChunk& chunk) {
  auto* owner = new BufferPtr(chunk.owner);
  return grpc::Slice(
      const_cast<uint8_t*>(chunk.bytes.data()), chunk.bytes.size(),
      [](void* held) { delete static_cast<BufferPtr*>(held); }, owner);
}

// Sets tensor, shard, slot and box of a stored piece. Returns whether SetState sent the piece.
bool FillRegion(JobRuntime& job, const step::PieceKey& key, v1::Region* out) {
  const std::shared_ptr<const JobModel> model = job.model();
  const uint32_t tensor = static_cast<uint32_t>(model->spec()->shards[key.shard].tensor);
  out->set_tensor(model->tensors()[tensor].name);
  out->set_shard(static_cast<uint64_t>(key.shard - model->FirstShard(tensor)));
  if (auto loads = job.shards().StagedLoads(key.shard); loads.ok()) {
    for (const auto& [slot, box] : *loads) {
      if (step::LoadRegion(SlotName(slot), box) != key.region) continue;
      out->set_slot(SlotName(slot));
      ToWire(box, out->mutable_box());
      return true;
    }
  }
  const std::shared_ptr<const step::Layout> layout = job.layout();
  if (layout == nullptr || key.rank >= layout->world_size()) return false;
  for (const step::Contribution& contribution : layout->by_rank[key.rank]) {
    if (contribution.tensor != static_cast<step::TensorId>(tensor) ||
        key.region >= contribution.boxes.size())
      continue;
    ToWire(contribution.boxes[key.region], out->mutable_box());
  }
  return false;
}

}  // namespace

DataService::DataService(JobTable* jobs, MessageRoom* messages) : jobs_(jobs), messages_(messages) {
  using grpc::internal::RpcMethod;
  using grpc::internal::RpcServiceMethod;
  AddMethod(new RpcServiceMethod(
      "/orlop.v1.Data/Push", RpcMethod::CLIENT_STREAMING,
      new grpc::internal::ClientStreamingHandler<DataService, ByteBuffer, v1::PushResponse>(
          [](DataService* service, grpc::ServerContext* context,
             grpc::ServerReader<ByteBuffer>* stream,
             v1::PushResponse* response) { return service->Push(context, stream, response); },
          this)));
  AddMethod(new RpcServiceMethod(
      "/orlop.v1.Data/Pull", RpcMethod::SERVER_STREAMING,
      new grpc::internal::ServerStreamingHandler<DataService, v1::PullRequest, ByteBuffer>(
          [](DataService* service, grpc::ServerContext* context, const v1::PullRequest* request,
             grpc::ServerWriter<ByteBuffer>* stream) {
            return service->Pull(context, request, stream);
          },
          this)));
  AddMethod(new RpcServiceMethod(
      "/orlop.v1.Data/QueryPush", RpcMethod::NORMAL_RPC,
      new grpc::internal::RpcMethodHandler<DataService, v1::QueryPushRequest,
                                           v1::QueryPushResponse>(
          [](DataService* service, grpc::ServerContext* context,
             const v1::QueryPushRequest* request, v1::QueryPushResponse* response) {
            return service->QueryPush(context, request, response);
          },
          this)));
  AddMethod(new RpcServiceMethod(
      "/orlop.v1.Data/SetState", RpcMethod::CLIENT_STREAMING,
      new grpc::internal::ClientStreamingHandler<DataService, ByteBuffer, v1::PushResponse>(
          [](DataService* service, grpc::ServerContext* context,
             grpc::ServerReader<ByteBuffer>* stream,
             v1::PushResponse* response) { return service->SetState(context, stream, response); },
          this)));
}

grpc::Status DataService::Receive(grpc::ServerContext* context, bool is_load,
                                  grpc::ServerReader<ByteBuffer>* stream,
                                  v1::PushResponse* response) {
  PushStream push(jobs_, is_load, WaitOf(context));
  for (ByteBuffer message; stream->Read(&message);) {
    const MessageRoom::Held held(messages_, message.Length());
    absl::StatusOr<DecodedChunk> chunk = DecodeChunk(message);
    if (!chunk.ok())
      return ToGrpc(MakeError(chunk.status().code(), std::string(chunk.status().message()),
                              v1::ErrorDetail::BAD_REQUEST));
    if (absl::Status status = push.Take(*chunk); !status.ok()) return ToGrpc(status);
  }
  if (absl::Status status = push.Finish(); !status.ok()) return ToGrpc(status);
  *response = push.response();
  return grpc::Status::OK;
}

grpc::Status DataService::Push(grpc::ServerContext* context, grpc::ServerReader<ByteBuffer>* stream,
                               v1::PushResponse* response) {
  return Receive(context, /*is_load=*/false, stream, response);
}

grpc::Status DataService::SetState(grpc::ServerContext* context,
                                   grpc::ServerReader<ByteBuffer>* stream,
                                   v1::PushResponse* response) {
  return Receive(context, /*is_load=*/true, stream, response);
}

grpc::Status DataService::Pull(grpc::ServerContext* context, const v1::PullRequest* request,
                               grpc::ServerWriter<ByteBuffer>* stream) {
  const auto send = [&](v1::Chunk* header, const ReadChunk& chunk) -> absl::Status {
    const StallWatch::Write write(&stalls_, [context] { context->TryCancel(); });
    if (stream->Write(EncodeChunk(*header, SliceOf(chunk)))) return absl::OkStatus();
    return absl::CancelledError("the caller went away, or took nothing for too long");
  };
  return ToGrpc(PullStream(jobs_, *request, WaitOf(context), send).Run());
}

grpc::Status DataService::QueryPush(grpc::ServerContext* context,
                                    const v1::QueryPushRequest* request,
                                    v1::QueryPushResponse* response) {
  const v1::StreamKey& key = request->key();
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->Find(key.job());
  if (!job.ok()) return ToGrpc(job.status());
  const absl::Status status =
      AskUntilAnswered(ForAnAttempt(WaitOf(context)), [&](const std::shared_ptr<Wakeup>& wakeup) {
        return (*job)->CheckKey(KeyOf(key), wakeup);
      }).status;
  const step::Position position = (*job)->position();
  if (!status.ok()) return ToGrpc(WithPosition(status, position, key.job()));
  size_t expected = 0;
  const std::vector<step::StagedPiece> pieces = (*job)->PiecesFrom(key.rank(), &expected);
  response->set_attempt(static_cast<uint32_t>(position.attempt));
  response->set_complete(pieces.size() >= expected);
  for (size_t i = request->after(); i < pieces.size(); ++i) {
    if (response->pieces_size() == static_cast<int>(kMaxPiecesPerPage)) {
      response->set_next(i);
      break;
    }
    v1::StoredPiece* stored = response->add_pieces();
    ToWire(pieces[i].payload, stored->mutable_digest());
    if (FillRegion(**job, pieces[i].key, stored->mutable_region()))
      response->set_complete(false);  // pieces of a LOAD may follow until its CommitStep
  }
  return grpc::Status::OK;
}

}  // namespace orlop::server
