// One push, 4 of 8 (ARCHITECTURE.md); next: server/lanes/push_stream.cc
#include "server/services/data_service.h"

#include <grpcpp/support/method_handler.h>

#include "absl/strings/str_cat.h"
#include "proto/chunk.h"
#include "proto/convert.h"
#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/status.h"
#include "server/job/contributions.h"
#include "server/job/step_codec.h"
#include "server/lanes/push_stream.h"
#include "server/runtime/answers.h"
#include "server/shards/shard.h"
#include "server/step/reason.h"

namespace orlop::server {
namespace {

using grpc::ByteBuffer;

// Shares the memory of a chunk with gRPC until it is sent.
grpc::Slice SliceOf(const ReadChunk& chunk) {
  auto* owner = new BufferPtr(chunk.owner);
  return grpc::Slice(
      const_cast<uint8_t*>(chunk.bytes.data()), chunk.bytes.size(),
      [](void* held) { delete static_cast<BufferPtr*>(held); }, owner);
}

// One Pull: regions in the order asked, their shards ascending.
class PullStream {
 public:
  PullStream(JobTable* jobs, StallWatch* stalls, grpc::ServerContext* context,
             const v1::PullRequest& request, grpc::ServerWriter<ByteBuffer>* stream)
      : jobs_(jobs),
        stalls_(stalls),
        context_(context),
        request_(request),
        wait_(WaitOf(context)),
        stream_(stream) {}

  absl::Status Run() {
    absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->Find(request_.job());
    if (!job.ok()) return job.status();
    job_ = *job;
    model_ = job_->model();
    if (absl::Status status = Check(); !status.ok()) return Explain(status);
    for (const v1::Region& region : request_.regions()) {
      if (absl::Status status = SendRegion(region); !status.ok()) return Explain(status);
    }
    return absl::OkStatus();
  }

 private:
  absl::Status Check() {
    const step::Position position = job_->position();
    const auto epoch = static_cast<int64_t>(request_.epoch());
    if (epoch != 0 && epoch < position.epoch) return step::StaleEpoch(epoch, position.epoch);
    if (request_.regions_size() < 1 ||
        request_.regions_size() > static_cast<int>(kMaxRegionsPerPull)) {
      return absl::InvalidArgumentError(
          absl::StrCat(request_.regions_size(), " regions; a pull has 1 to ", kMaxRegionsPerPull));
    }
    chunk_bytes_ =
        request_.max_chunk_bytes() == 0 ? kDefaultChunkBytes : request_.max_chunk_bytes();
    if (chunk_bytes_ > kMaxChunkBytes || chunk_bytes_ % kLeafBytes != 0) {
      return absl::InvalidArgumentError(absl::StrCat("max_chunk_bytes ", chunk_bytes_,
                                                     " must be a multiple of ", kLeafBytes,
                                                     " up to ", kMaxChunkBytes));
    }
    version_ = request_.has_version() ? request_.version() : position.committed_step;
    if (!request_.has_version() && version_ < 0) {
      return MakeError(absl::StatusCode::kFailedPrecondition,
                       absl::StrCat("job '", request_.job(), "' is LOADING"),
                       v1::ErrorDetail::LOADING);
    }
    key_.set_job(request_.job());
    key_.set_epoch(static_cast<uint64_t>(position.epoch));
    key_.set_generation(static_cast<uint64_t>(position.generation));
    key_.set_step(version_);
    return absl::OkStatus();
  }

  absl::Status SendRegion(const v1::Region& region) {
    tensor_ = region.tensor().substr(0, kMaxNameBytes);
    absl::StatusOr<uint32_t> index = model_->FindTensor(region.tensor());
    if (!index.ok()) return index.status();
    const Tensor& tensor = model_->tensors()[*index];
    absl::StatusOr<Box> box = NormalBox(tensor, region.has_box() ? &region.box() : nullptr);
    if (!box.ok()) return box.status();
    absl::StatusOr<Slot> slot = ParseSlot(region.slot());
    if (!slot.ok()) return slot.status();
    const uint64_t shard_count = model_->ShardCountOf(*index);
    if (region.has_shard() && region.shard() >= shard_count) {
      return absl::InvalidArgumentError(absl::StrCat("tensor '", tensor_, "' has no shard ",
                                                     region.shard(), "; it has ", shard_count));
    }
    const uint64_t first = region.has_shard() ? region.shard() : 0;
    const uint64_t last = region.has_shard() ? region.shard() : shard_count - 1;
    bool sent = false;
    for (uint64_t shard = first; shard <= last; ++shard) {
      const int32_t id = model_->FirstShard(*index) + static_cast<int32_t>(shard);
      if (model_->Owner(id) != jobs_->environment().self) continue;
      const Range range = ShardRange(shard, tensor.element_count, model_->shard_elements());
      if (BoxPart(*box, tensor.shape, range).empty()) continue;
      v1::Region filled = region;
      filled.set_shard(shard);
      if (absl::Status status = SendShard(id, *slot, *box, &filled); !status.ok()) return status;
      sent = true;
    }
    if (sent) return absl::OkStatus();
    return MakeError(
        absl::StatusCode::kNotFound,
        absl::StrCat("no shard of '", tensor_, "' that the region asks for is on this server"),
        v1::ErrorDetail::NOT_OWNER);
  }

  absl::StatusOr<std::unique_ptr<ShardReader>> OpenPinned(const ReadRequest& request) {
    const auto pin = job_->AwaitVersion(request.shard, request.version, wait_);
    if (!pin.ok()) return pin.status();
    return job_->shards().OpenRead(request);
  }

  absl::Status SendShard(int32_t id, Slot slot, const Box& box, v1::Region* region) {
    auto reader = OpenPinned({id, slot, region->dtype(), box, version_, chunk_bytes_});
    if (!reader.ok()) return reader.status();
    region->set_slot(SlotName(slot));
    region->set_dtype((*reader)->dtype());
    ToWire(box, region->mutable_box());
    v1::Chunk header;
    if (!key_sent_) *header.mutable_key() = key_;
    key_sent_ = true;
    *header.mutable_region() = *region;
    while (!(*reader)->done()) {
      absl::StatusOr<ReadChunk> chunk = (*reader)->Next();
      if (!chunk.ok()) return chunk.status();
      header.set_offset_bytes(chunk->offset_bytes);
      header.set_checksum(chunk->checksum);
      if (chunk->digest.has_value()) ToWire(*chunk->digest, header.mutable_piece_digest());
      const StallWatch::Write write(stalls_, [this] { context_->TryCancel(); });
      if (!stream_->Write(EncodeChunk(header, SliceOf(*chunk))))
        return absl::CancelledError("the caller went away, or took nothing for too long");
      header.Clear();
    }
    return absl::OkStatus();
  }

  absl::Status Explain(const absl::Status& status) const {
    const absl::Status placed = WithPosition(status, job_->position(), request_.job());
    v1::ErrorDetail detail = DetailOf(placed);
    if (detail.tensor().empty()) detail.set_tensor(tensor_);
    return MakeError(placed.code(), std::string(placed.message()), detail);
  }

  JobTable* const jobs_;
  StallWatch* const stalls_;
  grpc::ServerContext* const context_;
  const v1::PullRequest& request_;
  const Wait wait_;
  grpc::ServerWriter<ByteBuffer>* const stream_;
  std::shared_ptr<JobRuntime> job_;
  std::shared_ptr<const JobModel> model_;
  std::string tensor_;
  uint64_t chunk_bytes_ = 0;
  int64_t version_ = 0;
  v1::StreamKey key_;
  bool key_sent_ = false;
};

// The region of a stored piece; true if SetState brought it.
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
  return ToGrpc(PullStream(jobs_, &stalls_, context, *request, stream).Run());
}

grpc::Status DataService::QueryPush(grpc::ServerContext* context,
                                    const v1::QueryPushRequest* request,
                                    v1::QueryPushResponse* response) {
  const v1::StreamKey& key = request->key();
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->Find(key.job());
  if (!job.ok()) return ToGrpc(job.status());
  const absl::Status status = (*job)->AwaitAttempt(key, WaitOf(context));
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
      response->set_complete(false);  // a LOAD ends with its commit
  }
  return grpc::Status::OK;
}

}  // namespace orlop::server
