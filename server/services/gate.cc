#include "server/services/gate.h"

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/handover.h"
#include "base/mutex.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/parse_bound.h"
#include "proto/status.h"
#include "server/memory/request_room.h"
#include "server/runtime/answers.h"
#include "server/runtime/job_table.h"
#include "server/services/roles.h"
#include "server/step/actions.h"

namespace orlop::server {
namespace {

// Returns the job that a request is about, from its field `job` or `key.job`; empty: none.
std::string JobOf(const google::protobuf::Message& request) {
  const google::protobuf::Descriptor* type = request.GetDescriptor();
  const google::protobuf::Reflection* fields = request.GetReflection();
  if (const auto* job = type->FindFieldByName("job"); job != nullptr)
    return fields->GetString(request, job);
  const auto* key = type->FindFieldByName("key");
  return key == nullptr ? "" : JobOf(fields->GetMessage(request, key));
}

absl::Status BadMessage(const std::string& what) {
  return MakeError(absl::StatusCode::kInvalidArgument, what, v1::ErrorDetail::BAD_REQUEST);
}

int64_t NowMs() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

grpc::ByteBuffer Serialized(const google::protobuf::Message& message) {
  grpc::Slice slice(message.ByteSizeLong());
  message.SerializeWithCachedSizesToArray(const_cast<uint8_t*>(slice.begin()));
  return grpc::ByteBuffer(&slice, 1);
}

// ---- Rpcs --------------------------------------------------------------------------------------

void Rpcs::AddRpc(const std::string& method, Rpc rpc) {
  rpc.rule = FindRule(method);
  const bool is_of_peers = rpc.rule != nullptr && !rpc.rule->roles.Meets(kClients);
  rpc.max_bytes = is_of_peers ? kMaxPeerMessageBytes : kMaxControlMessageBytes;
  rpcs_.emplace(method, std::make_unique<const Rpc>(std::move(rpc)));
}

void Rpcs::AddStream(
    const std::string& method,
    std::function<StreamCall*(Gate*, grpc::GenericCallbackServerContext*)> stream) {
  AddRpc(method, {nullptr, true, 0, ParseBound(v1::ErrorDetail::default_instance()), nullptr,
                  nullptr, nullptr, std::move(stream)});
}

absl::Status Rpcs::Check() const {
  for (const auto& [method, rpc] : rpcs_)
    if (rpc->rule == nullptr)
      return absl::InternalError(absl::StrCat("RPC ", method, " has no rule"));
  for (const Rule& rule : Rules())
    if (!rpcs_.contains(rule.method))
      return absl::InternalError(absl::StrCat("no RPC has the rule of ", rule.method));
  return absl::OkStatus();
}

// ---- Gate --------------------------------------------------------------------------------------

absl::StatusOr<const Rpc*> Gate::Find(const std::string& method) {
  const auto found = rpcs_->rpcs_.find(method);
  // A door does not tell what other doors have.
  const bool is_here = found != rpcs_->rpcs_.end() && found->second->rule != nullptr &&
                       found->second->rule->roles.Meets(options_.roles);
  if (!is_here)
    return MakeError(absl::StatusCode::kUnimplemented,
                     absl::StrCat("this address has no RPC ", Beginning(method, kMaxNameBytes)),
                     v1::ErrorDetail::BAD_REQUEST);
  const bool is_stream = found->second->stream != nullptr;
  const int most = is_stream ? options_.max_streams : options_.max_calls;
  MutexLock lock(&mutex_);
  const int now =
      is_stream ? static_cast<int>(streams_.size()) : calls_[found->second->may_wait].load();
  if (now >= most)
    return MakeError(
        absl::StatusCode::kResourceExhausted,
        absl::StrCat("the limit is ", most, is_stream ? " streams at a time" : " calls at a time"),
        v1::ErrorDetail::BUSY);
  return found->second.get();
}

grpc::ServerGenericBidiReactor* Gate::CreateReactor(grpc::GenericCallbackServerContext* context) {
  arrivals_.Arrived(context->method(), Arrivals::LaneOf(*context->auth_context()));
  absl::StatusOr<const Rpc*> rpc = Find(context->method());
  std::shared_ptr<const Identity> identity = options_.identify(*context->auth_context());
  if (rpc.ok())
    if (absl::Status allowed = Check(*(*rpc)->rule, *identity, ""); !allowed.ok()) rpc = allowed;
  if (rpc.ok() && (*rpc)->stream != nullptr) {
    StreamCall* stream = (*rpc)->stream(this, context);
    stream->identity_ = std::move(identity);
    TellGiven(stream);
    return stream;
  }
  auto* call = new Call(this, context, rpc.ok() ? *rpc : nullptr);
  call->identity_ = std::move(identity);
  if (rpc.ok()) {
    {
      MutexLock lock(&mutex_);
      reading_[call] = NowMs();
    }
    call->StartRead(&call->bytes_);
  } else {
    call->End(rpc.status());
  }
  return call;
}

absl::Status Gate::Check(const Rule& rule, const Identity& identity, std::string_view job) const {
  return identity.Check({rule.method, rule.roles.And(options_.roles)}, job);
}

absl::StatusOr<RequestRoom::Held> Gate::Parse(grpc::ByteBuffer* bytes, size_t max_bytes,
                                              const ParseBound& bound,
                                              google::protobuf::Message* message) {
  const std::string& type = message->GetDescriptor()->name();
  if (bytes->Length() > max_bytes)
    return BadMessage(
        absl::StrCat(type, " has ", bytes->Length(), " bytes; the limit is ", max_bytes));
  grpc::Slice whole;
  if (!bytes->DumpToSingleSlice(&whole).ok())
    return BadMessage(absl::StrCat("the bytes of a ", type, " cannot be read"));
  bytes->Clear();
  const absl::StatusOr<uint64_t> parsed_bytes = bound.Of({whole.begin(), whole.size()});
  if (!parsed_bytes.ok()) return BadMessage(std::string(parsed_bytes.status().message()));
  absl::StatusOr<RequestRoom::Held> room = room_->Take(*parsed_bytes);
  if (room.ok() && !message->ParseFromArray(whole.begin(), static_cast<int>(whole.size())))
    return BadMessage(absl::StrCat("the bytes are no ", type));
  return room;
}

void Gate::Tick() {
  arrivals_.Tick();
  const int64_t now = NowMs();
  MutexLock lock(&mutex_);
  for (StreamCall* stream : streams_) {
    const int64_t since = stream->transfer_since_ms_;
    // A call that began a transfer is made, so that it may be asked.
    if (since == 0 || now - since < kWantedStallMs) continue;
    if (now - since >= kMaxStallMs || stream->IsWanted()) stream->context_->TryCancel();
  }
  for (const auto& [call, since] : reading_)
    if (now - since >= kMaxRequestMs) call->context_->TryCancel();
}

// ---- StreamCall --------------------------------------------------------------------------------

StreamCall::StreamCall(Gate* gate, grpc::GenericCallbackServerContext* context)
    : gate_(gate),
      context_(context),
      deadline_(DeadlineOf(*context)),
      lane_(Arrivals::LaneOf(*context->auth_context())) {
  MutexLock lock(&gate_->mutex_);
  gate_->streams_.insert(this);
}

void StreamCall::OnDone() {
  TellTaken(this);
  gate_->arrivals_.Ended(context_->method(), lane_, was_cancelled());
  {
    MutexLock lock(&gate_->mutex_);
    gate_->streams_.erase(this);
  }
  delete this;
}

absl::Status StreamCall::CheckJob(std::string_view job) const {
  return gate_->Check(*FindRule(context_->method()), *identity_, job);
}

void StreamCall::BeginTransfer() { transfer_since_ms_ = NowMs(); }
void StreamCall::EndTransfer() { transfer_since_ms_ = 0; }

void StreamCall::Submit(std::function<void()> task) {
  gate_->options_.stream_threads->Submit(std::move(task));
}

// ---- Call --------------------------------------------------------------------------------------

Call::Call(Gate* gate, grpc::GenericCallbackServerContext* context, const Rpc* rpc)
    : gate_(gate),
      context_(context),
      deadline_(DeadlineOf(*context)),
      lane_(Arrivals::LaneOf(*context->auth_context())),
      rpc_(rpc) {
  if (rpc_ != nullptr) ++gate_->calls_[rpc_->may_wait];
}

Call::~Call() {
  gate_->arrivals_.Ended(context_->method(), lane_, was_cancelled());
  if (rpc_ != nullptr) --gate_->calls_[rpc_->may_wait];
}

absl::Status Call::Hold(uint64_t bytes) {
  absl::StatusOr<RequestRoom::Held> room = gate_->room_->Take(bytes);
  if (!room.ok()) return room.status();
  held_room_ = *std::move(room);
  return absl::OkStatus();
}

bool Call::MaySee(std::string_view job) const {
  return gate_->Check(*rpc_->rule, *identity_, job).ok();
}

bool Call::IsOperator(std::string_view job) const {
  return identity_->May(Roles{Role::kOperator}.And(gate_->options_.roles), job);
}

ThreadPool* Call::threads() const { return gate_->options_.threads; }

std::unique_ptr<grpc::ClientContext> Call::Onward() const {
  return grpc::ClientContext::FromCallbackServerContext(*context_);
}

void Call::OnDone() {
  TellTaken(this);
  delete this;
}

void Call::OnReadDone(bool is_read) {
  TellTaken(this);
  {
    MutexLock lock(&gate_->mutex_);
    gate_->reading_.erase(this);
  }
  if (!is_read) return End(BadMessage("the call has no request"));
  gate_->options_.threads->Submit([this] { Handle(); });
}

void Call::Handle() {
  request_ = rpc_->make_request();
  absl::StatusOr<RequestRoom::Held> room =
      gate_->Parse(&bytes_, rpc_->max_bytes, rpc_->bound, request_.get());
  if (!room.ok()) return End(room.status());
  request_room_ = *std::move(room);
  if (absl::Status allowed = gate_->Check(*rpc_->rule, *identity_, JobOf(*request_)); !allowed.ok())
    return End(allowed);
  response_ = rpc_->make_response();
  rpc_->handle(this, *request_, response_.get());
}

void Call::Ask(const std::shared_ptr<JobRuntime>& job,
               const std::function<step::RequestId(LeaderShell&, Caller)>& ask,
               std::function<void(absl::StatusOr<step::Answer>)> next) {
  const std::shared_ptr<Pending> pending = pending_;  // `next` may end the call in here
  const int number = pending->Begin();
  const step::RequestId request = ask(*job->leader(), {std::move(next), deadline_});
  pending->Set(number, [job, request] {
    job->leader()->Withdraw(request, absl::CancelledError("the caller went away"));
  });
}

void Call::End(const absl::Status& status) {
  absl::Status end = status;
  if (end.ok()) {
    absl::StatusOr<RequestRoom::Held> room = gate_->room_->Take(response_->ByteSizeLong());
    end = room.status();
    if (room.ok()) response_room_ = *std::move(room);
  }
  if (!end.ok()) return Finish(ToGrpc(end));
  bytes_ = Serialized(*response_);
  StartWriteAndFinish(&bytes_);
}

int Pending::Begin() {
  MutexLock lock(&mutex_);
  withdraw_ = nullptr;
  return ++requests_;
}

void Pending::Set(int request, std::function<void()> withdraw) {
  {
    MutexLock lock(&mutex_);
    if (request != requests_) return;
    if (!is_cancelled_) return withdraw_.swap(withdraw);
  }
  withdraw();
}

void Pending::Cancel() {
  std::function<void()> withdraw;
  {
    MutexLock lock(&mutex_);
    is_cancelled_ = true;
    withdraw_.swap(withdraw);
  }
  if (withdraw) withdraw();
}

}  // namespace orlop::server
