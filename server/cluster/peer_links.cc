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
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "orlop/v1/admin.grpc.pb.h"
#include "orlop/v1/admin.pb.h"
#include "orlop/v1/peer.grpc.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"

namespace orlop::server {
namespace {

constexpr auto kMessageTimeout = std::chrono::seconds(5);
constexpr auto kCallTimeout = std::chrono::seconds(30);  // the server may have to spill slots
constexpr auto kDescribeTimeout = std::chrono::seconds(5);
constexpr auto kLookTimeout = std::chrono::seconds(1);
constexpr int kMaxBackoffMs = 1000;
constexpr auto kReconnectTimeout = std::chrono::milliseconds(3 * kMaxBackoffMs / 2);
// A connection that answers no ping within the timeout is closed, and a new one is made. gRPC also
// sets TCP_USER_TIMEOUT to the timeout, which ends a connection that takes no bytes.
constexpr int kPingMs = 2000, kPingTimeoutMs = 3000;

void SetDeadline(grpc::ClientContext* context, std::chrono::system_clock::duration timeout) {
  context->set_deadline(std::chrono::system_clock::now() + timeout);
}

// The memory of a call that nobody waits for. It lives until the call has ended.
struct Flight {
  grpc::ClientContext context;
  v1::StepMessage message;
  v1::StepAck ack;
};
template <typename Request, typename Response>
struct Question {
  grpc::ClientContext context;
  Request request;
  Response response;
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
    arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kMaxBackoffMs);
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kPingMs);
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kPingTimeoutMs);
    arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
    auto channel = grpc::CreateCustomChannel(peer.peer_address, credentials, arguments);
    links_.push_back({channel, v1::Peer::NewStub(channel), v1::Admin::NewStub(channel)});
  }
  MutexLock lock(&calls_->mutex);
  for (const PeerAddress& peer : addresses_) {
    Seen seen;
    seen.info.set_name(peer.name);
    seen.info.set_address(peer.address);
    seen.answered = seen.asked = std::chrono::steady_clock::now();
    calls_->seen.push_back(std::move(seen));
  }
}

PeerLinks::~PeerLinks() {
  {
    MutexLock lock(&calls_->mutex);
    while (calls_->under_way > 0) calls_->idle.Wait(&calls_->mutex);
  }
  // A call keeps its channel until its memory is freed, after its end. If that were the last owner,
  // a thread of gRPC would end the queue that it runs on, which gRPC 1.51 does not survive.
  for (Link& link : links_) {
    link.peer.reset();
    link.admin.reset();
    while (link.channel.use_count() > 1) absl::SleepFor(absl::Milliseconds(1));
  }
}

void PeerLinks::SetOnAnswer(OnAnswer callback) {
  MutexLock lock(&calls_->mutex);
  calls_->on_answer = std::move(callback);
}

void PeerLinks::Send(int to, v1::StepMessage message) {
  auto flight = std::make_shared<Flight>();
  flight->message = std::move(message);
  SetDeadline(&flight->context, kMessageTimeout);
  Begin();
  links_[to].peer->async()->Step(&flight->context, &flight->message, &flight->ack,
                                 [calls = calls_, to, flight](const grpc::Status& status) {
                                   OnAnswer on_answer;
                                   {
                                     MutexLock lock(&calls->mutex);
                                     on_answer = calls->on_answer;
                                   }
                                   if (on_answer) on_answer(to, flight->message, FromGrpc(status));
                                   End(calls.get());
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

void PeerLinks::DescribeShards(
    int to, const v1::DescribeTensorRequest& request,
    const std::function<void(absl::StatusOr<v1::DescribeTensorResponse>)>& next) {
  auto flight = std::make_shared<Question<v1::DescribeTensorRequest, v1::DescribeTensorResponse>>();
  flight->request = request;
  SetDeadline(&flight->context, kDescribeTimeout);
  Begin();
  links_[to].peer->async()->DescribeShards(&flight->context, &flight->request, &flight->response,
                                           [=, this, calls = calls_](const grpc::Status& status) {
                                             if (status.ok()) {
                                               next(std::move(flight->response));
                                             } else {
                                               next(Named(to, status));
                                             }
                                             End(calls.get());
                                           });
}

void PeerLinks::Look(int at, const std::function<void(Seen)>& next, Patience patience) {
  auto flight = std::make_shared<Question<v1::IdentifyRequest, v1::ServerInfo>>();
  const auto asked = std::chrono::steady_clock::now();
  SetDeadline(&flight->context, patience == kUntilConnected ? kReconnectTimeout : kLookTimeout);
  flight->context.set_wait_for_ready(patience == kUntilConnected);
  Begin();
  links_[at].peer->async()->Identify(&flight->context, &flight->request, &flight->response,
                                     [=, calls = calls_](const grpc::Status& status) {
                                       Seen seen;
                                       {
                                         MutexLock lock(&calls->mutex);
                                         Seen& known = calls->seen[at];
                                         known.status = FromGrpc(status);
                                         known.asked = asked;
                                         if (status.ok()) {
                                           known.info = flight->response;
                                           known.answered = std::chrono::steady_clock::now();
                                         }
                                         seen = known;
                                       }
                                       next(std::move(seen));
                                       End(calls.get());
                                     });
}

PeerLinks::Seen PeerLinks::LastSeen(int server) const {
  MutexLock lock(&calls_->mutex);
  return calls_->seen[server];
}

void PeerLinks::Begin() {
  MutexLock lock(&calls_->mutex);
  ++calls_->under_way;
}

void PeerLinks::End(Calls* calls) {
  MutexLock lock(&calls->mutex);
  if (--calls->under_way == 0) calls->idle.SignalAll();
}

}  // namespace orlop::server
