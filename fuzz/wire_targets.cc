// Targets of what workers send: chunks, requests, and the details of errors.
#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>
#include <grpcpp/support/status.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/box.h"
#include "fuzz/model.h"
#include "fuzz/mutators.h"
#include "fuzz/target.h"
#include "orlop/v1/admin.pb.h"
#include "orlop/v1/data.pb.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/chunk.h"
#include "proto/parse_bound.h"
#include "proto/status.h"
#include "server/job/contributions.h"
#include "server/job/job_model.h"
#include "server/job/manifest.h"
#include "server/job/optimizer_config.h"
#include "server/job/slots.h"
#include "server/lanes/region.h"
#include "server/runtime/step_scalars.h"
#include "server/step/layout.h"

namespace orlop::fuzz {
namespace {

// ---- Chunks ------------------------------------------------------------------------------------

// An input is a byte that tells where the message is cut into slices, and the message.
grpc::ByteBuffer Cut(uint8_t cuts, std::string_view message) {
  std::vector<grpc::Slice> slices;
  const size_t step = cuts == 0 ? message.size() + 1 : cuts;
  for (size_t at = 0; at < message.size() || slices.empty(); at += step)
    slices.emplace_back(message.data() + at, std::min(step, message.size() - at));
  return grpc::ByteBuffer(slices.data(), slices.size());
}

std::string Joined(const std::vector<grpc::Slice>& slices) {
  std::string joined;
  for (const grpc::Slice& slice : slices)
    joined.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  return joined;
}

// The decoder must agree with protobuf's generated parser, wherever the message is cut.
void RunChunk(Bytes input) {
  if (input.empty()) return;
  const std::string message(AsText(input.subspan(1)));
  const absl::StatusOr<DecodedChunk> decoded = DecodeChunk(Cut(input[0], message));
  v1::Chunk parsed;
  const bool is_chunk = parsed.ParseFromString(message);
  Require(decoded.ok() == is_chunk, "DecodeChunk accepts what the parser accepts");
  if (!decoded.ok()) return;
  Require(decoded->header.payload().empty(), "the header has no payload");
  Require(Joined(decoded->payload) == parsed.payload(), "the payload is the message's");
  Require(decoded->payload_bytes == parsed.payload().size(), "its size is counted");
  const grpc::Slice payload(parsed.payload());
  parsed.clear_payload();
  Require(decoded->header.SerializeAsString() == parsed.SerializeAsString(),
          "the header is the message's");
  const absl::StatusOr<DecodedChunk> again = DecodeChunk(EncodeChunk(decoded->header, payload));
  Require(again.ok() && Joined(again->payload) == Joined({payload}), "an encoded chunk is decoded");
}

std::vector<std::string> ChunkSeeds() {
  v1::Chunk chunk;
  chunk.mutable_key()->set_job("job");
  chunk.mutable_key()->set_step(3);
  chunk.mutable_region()->set_tensor("w");
  chunk.mutable_region()->set_shard(1);
  chunk.set_checksum(7);
  chunk.mutable_piece_digest()->set_high(1);
  chunk.set_applied_count(2);
  const std::string header = chunk.SerializeAsString();
  chunk.set_payload(std::string(40, 'x'));
  const std::string whole = chunk.SerializeAsString();
  // Payload first, a field twice, a size that is not there, and no payload.
  return {
      absl::StrCat(std::string(1, '\0'), whole), absl::StrCat("\5", whole),
      absl::StrCat("\3", "\x7a\x02xy", header), absl::StrCat("\1", whole, "\x7a\x01z"),
      absl::StrCat("\7", header, "\x7a\x7f"), absl::StrCat("\2", header),
      // A size and a tag of more bits than they may have.
      absl::StrCat(std::string(1, '\0'), header, "\x7a\x82\x80\x80\x80\x10xy"),
      absl::StrCat(std::string(1, '\0'), header, std::string("\xfa\x80\x80\x80\x80\x00\x02xy", 9))};
}

std::string MutateChunk(Bytes input, size_t max_size, uint32_t seed) {
  static const auto* const hints = new MessageHints{Words(), nullptr};
  if (input.empty() || max_size < 2) return MutateBytes(AsText(input), max_size);
  const uint8_t cuts = seed % 5 == 1 ? static_cast<uint8_t>(seed >> 8) : input[0];
  return std::string(1, static_cast<char>(cuts)) + MutateMessage(v1::Chunk::default_instance(),
                                                                 *hints, AsText(input.subspan(1)),
                                                                 max_size - 1, seed);
}

// ---- Requests ----------------------------------------------------------------------------------

struct Request {
  const google::protobuf::Message* prototype;
  ParseBound bound;
};

// The requests of all RPCs of all services, in the order of the .proto files.
const std::vector<Request>& Requests() {
  static const auto* const requests = [] {
    auto* list = new std::vector<Request>;
    for (const google::protobuf::Descriptor* of_file :
         {v1::CreateJobRequest::descriptor(), v1::PullRequest::descriptor(),
          v1::ListJobsRequest::descriptor(), v1::JobDefinition::descriptor()}) {
      const auto* service = of_file->file()->service(0);
      for (int i = 0; i < service->method_count(); ++i) {
        const google::protobuf::Message* prototype =
            google::protobuf::MessageFactory::generated_factory()->GetPrototype(
                service->method(i)->input_type());
        list->push_back({prototype, ParseBound(*prototype)});
      }
    }
    return list;
  }();
  return *requests;
}

void Decode(const v1::CreateJobRequest& request) {
  v1::CreateJobRequest manifest = request;
  if (!server::ValidateName("job", manifest.job()).ok()) return;
  const bool is_complete = server::CompleteManifest(&manifest).ok();
  for (const v1::TensorSpec& tensor : manifest.tensors()) (void)server::ValidateTensorSpec(tensor);
  if (is_complete) server::ManifestDigest(manifest);
}

void Decode(const v1::JoinRequest& request) {
  if (request.world_size() < 1 || request.world_size() > 512 ||
      request.rank() >= request.world_size())
    return;  // as CheckClient (server/services/job_service.cc)
  const auto contributions =
      server::Contributions(Model(), request.layout(), request.rank(), request.world_size());
  if (!contributions.ok()) return;
  step::Layout layout;
  layout.by_rank = {*contributions};
  for (int server : {0, 1}) server::PiecesFor(Model(), Model().LayoutFor(server), layout);
  (void)server::ContributionsPerElement(Model(), layout);
}

void DecodeRegion(const v1::Region& wire) {
  const std::vector<std::string> names = {"a", "b"};
  for (const auto of : {server::RegionOf::kGradient, server::RegionOf::kState}) {
    const absl::StatusOr<server::Region> region = server::ParseRegion(Model(), wire, of);
    if (!region.ok()) {
      (void)server::Explain(region.status(), {"job", wire.tensor(), wire.shard()}, {});
      continue;
    }
    const server::Tensor& tensor = Model().tensors()[region->tensor];
    Require(ValidateBox(region->box, tensor.shape, tensor.element_count).ok(),
            "a region is inside its tensor");
    (void)server::CheckOnePiece(Model(), *region, 0, names);
  }
}

// What the handler of a request does with it before it looks at the job's state.
void Decode(const google::protobuf::Message& message) {
  if (const auto* create = dynamic_cast<const v1::CreateJobRequest*>(&message)) Decode(*create);
  if (const auto* join = dynamic_cast<const v1::JoinRequest*>(&message)) Decode(*join);
  if (const auto* configure = dynamic_cast<const v1::ConfigureOptimizerRequest*>(&message))
    (void)server::ValidateOptimizer(Model(), *configure);
  if (const auto* commit = dynamic_cast<const v1::CommitStepRequest*>(&message))
    (void)server::ParseGroups(Model(), commit->groups());
  if (const auto* pull = dynamic_cast<const v1::PullRequest*>(&message))
    for (const v1::Region& region : pull->regions()) DecodeRegion(region);
  if (const auto* chunk = dynamic_cast<const v1::Chunk*>(&message)) {
    DecodeRegion(chunk->region());
    server::KeyOf(chunk->key());
  }
}

const Request& RequestOf(uint8_t number) { return Requests()[number % Requests().size()]; }

// An input is a byte that tells which request it is, and the request. A parsed request takes no
// more memory than its bound.
void RunRequest(Bytes input) {
  if (input.empty()) return;
  const Request& request = RequestOf(input[0]);
  const Bytes bytes = input.subspan(1);
  const absl::StatusOr<uint64_t> most = request.bound.Of(bytes);
  if (!most.ok()) return;
  const std::unique_ptr<google::protobuf::Message> message(request.prototype->New());
  if (!message->ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) return;
  if (*most < message->SpaceUsedLong())
    Require(false, "a request takes no more than its bound", message->DebugString());
  Decode(*message);
}

std::string MutateRequest(Bytes input, size_t max_size, uint32_t seed) {
  static const auto* const hints = new MessageHints{Words(), nullptr};
  if (input.empty() || max_size < 2) return MutateBytes(AsText(input), max_size);
  const uint8_t number = seed % 11 == 1 ? static_cast<uint8_t>(seed >> 8) : input[0];
  return std::string(1, static_cast<char>(number)) + MutateMessage(*RequestOf(number).prototype,
                                                                   *hints, AsText(input.subspan(1)),
                                                                   max_size - 1, seed);
}

// Adds requests that are refused, each for another reason.
void AddRefused(const v1::ConfigureOptimizerRequest& configure,
                const std::function<void(const google::protobuf::Message&)>& add) {
  for (const uint32_t tensor : {0, 1, 2, 9}) {  // given twice, of one dimension, a buffer, unknown
    v1::ConfigureOptimizerRequest refused = configure;
    refused.mutable_groups(1)->set_optimizer(tensor == 1 ? "muon" : "lion");
    refused.mutable_groups(1)->set_tensors(0, tensor);
    add(refused);
  }
  v1::ConfigureOptimizerRequest refused = configure;
  refused.mutable_groups(0)->set_optimizer("muon");  // "w" is on two servers
  add(refused);
  refused.mutable_groups(0)->set_optimizer("store");
  refused.set_max_norm(1);
  add(refused);
  refused.Clear();
  for (int i = 0; i < 1025; ++i) refused.add_groups();
  add(refused);
  v1::CreateJobRequest create = Definition().manifest();
  for (int i = 0; i < 17; ++i) create.mutable_tensors(0)->add_tied_names("n");
  add(create);
  v1::JoinRequest join;
  join.set_world_size(1);
  for (const uint32_t tensor : {0, 1, 1}) {  // each element of "bias" twice, of "w" once
    v1::TensorBoxes* boxes = join.mutable_layout()->add_tensors();
    boxes->set_tensor(tensor);
    v1::Box* box = boxes->add_boxes();
    box->set_flat(true);
    box->add_offset(0);
    box->add_extent(tensor == 0 ? 800 : 100);
  }
  add(join);
}

std::vector<std::string> RequestSeeds() {
  std::vector<std::string> seeds;
  const v1::JobDefinition definition = Definition();
  const auto add = [&](const google::protobuf::Message& message) {
    for (size_t i = 0; i < Requests().size(); ++i)
      if (Requests()[i].prototype->GetDescriptor() == message.GetDescriptor())
        seeds.push_back(std::string(1, static_cast<char>(i)) + message.SerializeAsString());
  };
  for (const Request& request : Requests()) add(*request.prototype);
  add(definition);
  add(definition.manifest());
  v1::ConfigureOptimizerRequest configure = definition.optimizer();
  configure.set_job("job");
  add(configure);
  v1::JoinRequest join;
  join.set_job("job");
  join.set_rank(1);
  join.set_world_size(2);
  join.set_client_id("client");
  for (const auto preset : {v1::ContributionLayout::WHOLE, v1::ContributionLayout::FLAT_SLICES,
                            v1::ContributionLayout::EXPLICIT}) {
    join.mutable_layout()->set_preset(preset);
    add(join);
  }
  v1::TensorBoxes* boxes = join.mutable_layout()->add_tensors();
  v1::Box* box = boxes->add_boxes();
  for (const uint64_t extent : {2, 3}) {
    box->add_offset(1);
    box->add_extent(extent);
  }
  add(join);
  v1::PullRequest pull;
  pull.set_job("job");
  v1::Region* region = pull.add_regions();
  region->set_tensor("w");
  region->set_slot("exp_avg_absmax");
  region->set_shard(2);
  *region->mutable_box() = *box;
  add(pull);
  AddRefused(configure, add);
  for (int i = 0; i < 9; ++i) box->add_offset(0);  // more dimensions than there may be
  add(join);
  v1::Chunk chunk;
  chunk.mutable_key()->set_job("job");
  *chunk.mutable_region() = *region;
  chunk.mutable_region()->set_slot("gradient");
  add(chunk);
  v1::CommitStepRequest commit;
  commit.set_job("job");
  for (const char* name : {"lr", "beta1", "beta2", "eps", "weight_decay"})
    (*commit.add_groups()->mutable_values())[name] = 0.5;
  add(commit);
  commit.clear_groups();
  auto& adamw = *commit.add_groups()->mutable_values();
  for (const char* name : {"lr", "beta1", "beta2", "eps", "weight_decay"}) adamw[name] = 0.5;
  auto& lion = *commit.add_groups()->mutable_values();
  for (const char* name : {"lr", "beta1", "beta2", "weight_decay"}) lion[name] = 0.5;
  add(commit);
  return seeds;
}

// ---- Errors ------------------------------------------------------------------------------------

// An input is a code, and what a server has sent as the detail of an error.
void RunStatus(Bytes input) {
  if (input.empty()) return;
  const std::string detail(AsText(input.subspan(1)));
  const grpc::Status sent(static_cast<grpc::StatusCode>(input[0] % 20), detail, detail);
  const absl::Status received = FromGrpc(sent);
  Require(received.ok() == sent.ok(), "an error stays an error");
  const v1::ErrorDetail before = DetailOf(received);
  const absl::Status more = Annotated(received, "context", before);
  Require(more.ok() == sent.ok(), "an annotated error stays an error");
  Require(ToGrpc(more).ok() == sent.ok(), "an error is sent as one");
  const size_t most = input[0];
  Require(Beginning(detail, most).size() <= most, "a beginning is short");
  (void)MakeError(absl::StatusCode::kAborted, detail, before.reason());
}

std::vector<std::string> StatusSeeds() {
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::NOT_OWNER);
  detail.set_tensor("w\xc3\xa9");
  detail.set_shard(3);
  return {absl::StrCat("\5", detail.SerializeAsString()), std::string(1, '\0'),
          absl::StrCat("\x30", std::string(60, '\x80')), "\x0d\xff\xff"};
}

}  // namespace

Target ChunkTarget() { return {RunChunk, MutateChunk, ChunkSeeds()}; }

Target RequestsTarget() { return {RunRequest, MutateRequest, RequestSeeds()}; }

Target StatusTarget() {
  return {RunStatus,
          [](Bytes input, size_t max_size, uint32_t seed) {
            static const auto* const hints = new MessageHints{Words(), nullptr};
            if (input.empty() || max_size < 2) return MutateBytes(AsText(input), max_size);
            return std::string(1, static_cast<char>(seed % 7 == 1 ? seed >> 8 : input[0])) +
                   MutateMessage(v1::ErrorDetail::default_instance(), *hints,
                                 AsText(input.subspan(1)), max_size - 1, seed);
          },
          StatusSeeds()};
}

}  // namespace orlop::fuzz
