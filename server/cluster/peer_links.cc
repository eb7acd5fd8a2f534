#include "server/cluster/peer_links.h"

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "orlop/v1/admin.grpc.pb.h"
#include "orlop/v1/admin.pb.h"
#include "orlop/v1/job.grpc.pb.h"
#include "orlop/v1/peer.grpc.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"

namespace orlop::server {
namespace {

constexpr auto kMessageTimeout = std::chrono::seconds(5);
constexpr auto kCallTimeout = std::chrono::seconds(30);  // the server may have to spill slots

void SetDeadline(grpc::ClientContext* context, std::chrono::system_clock::duration timeout) {
  context->set_deadline(std::chrono::system_clock::now() + timeout);
}

// A Flight has the memory of one call of Send. It lives until the call has ended.
struct Flight {
  grpc::ClientContext context;
  v1::StepMessage message;
  v1::StepAck ack;
};

}  // namespace

PeerLinks::PeerLinks(std::vector<PeerAddress> peers,
                     const std::shared_ptr<grpc::ChannelCredentials>& credentials)
    : addresses_(std::move(peers)) {
  for (const PeerAddress& peer : addresses_) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(static_cast<int>(kMaxPeerMessageBytes));
    arguments.SetMaxSendMessageSize(static_cast<int>(kMaxPeerMessageBytes));
    // A channel reconnects at least once a second, so that it soon finds a restarted server.
    arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 100);
    arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
    auto channel = grpc::CreateCustomChannel(peer.address, credentials, arguments);
    links_.push_back(
        {v1::Peer::NewStub(channel), v1::Admin::NewStub(channel), v1::Job::NewStub(channel)});
  }
}

PeerLinks::~PeerLinks() {
  MutexLock lock(&calls_->mutex);
  while (calls_->under_way > 0) calls_->idle.Wait(&calls_->mutex);
}

void PeerLinks::OnUnknownJob(std::function<void(int, const std::string&)> callback) {
  MutexLock lock(&calls_->mutex);
  calls_->on_unknown_job = std::move(callback);
}

void PeerLinks::Send(int to, v1::StepMessage message) {
  auto flight = std::make_shared<Flight>();
  flight->message = std::move(message);
  SetDeadline(&flight->context, kMessageTimeout);
  {
    MutexLock lock(&calls_->mutex);
    ++calls_->under_way;
  }
  links_[to].peer->async()->Step(&flight->context, &flight->message, &flight->ack,
                                 [calls = calls_, to, flight](const grpc::Status& status) {
                                   std::function<void(int, const std::string&)> unknown;
                                   if (status.error_code() == grpc::StatusCode::NOT_FOUND) {
                                     MutexLock lock(&calls->mutex);
                                     unknown = calls->on_unknown_job;
                                   }
                                   if (unknown) unknown(to, flight->message.job());
                                   MutexLock lock(&calls->mutex);
                                   if (--calls->under_way == 0) calls->idle.SignalAll();
                                 });
}

absl::Status PeerLinks::Named(int to, const grpc::Status& status) const {
  v1::ErrorDetail detail;
  detail.set_server(addresses_[to].name);
  return Annotated(FromGrpc(status), absl::StrCat("server ", addresses_[to].name), detail);
}

absl::Status PeerLinks::PutJob(int to, const v1::JobDefinition& definition) {
  grpc::ClientContext context;
  SetDeadline(&context, kCallTimeout);
  v1::PutJobResponse response;
  return Named(to, links_[to].peer->PutJob(&context, definition, &response));
}

absl::Status PeerLinks::DropJob(int to, const std::string& job) {
  grpc::ClientContext context;
  SetDeadline(&context, kCallTimeout);
  v1::DropJobRequest request;
  request.set_job(job);
  v1::DropJobResponse response;
  return Named(to, links_[to].peer->DropJob(&context, request, &response));
}

absl::StatusOr<v1::ServerInfo> PeerLinks::Identify(int to) {
  grpc::ClientContext context;
  SetDeadline(&context, std::chrono::seconds(2));
  v1::ServerInfo info;
  if (absl::Status status = Named(to, links_[to].peer->Identify(&context, {}, &info)); !status.ok())
    return status;
  return info;
}

absl::StatusOr<v1::DescribeTensorResponse> PeerLinks::DescribeShards(
    int to, const v1::DescribeTensorRequest& request) {
  grpc::ClientContext context;
  SetDeadline(&context, std::chrono::seconds(5));
  v1::DescribeTensorResponse response;
  if (absl::Status status =
          Named(to, links_[to].peer->DescribeShards(&context, request, &response));
      !status.ok())
    return status;
  return response;
}

}  // namespace orlop::server
