#include "client/link/link.h"

#include <chrono>
#include <cstdint>
#include <fstream>
#include <ios>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/checksum.h"
#include "base/mutex.h"
#include "client/link/options.h"
#include "client/link/retry.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"

namespace orlop::client {
namespace {

constexpr int kReconnectFirstMs = 100, kReconnectLongestMs = 2000;
// An attempt to connect ends after this time, or the pause before it if that is longer. Without a
// limit of ours it lasts 20 s, in which TCP repeats a lost packet ever more rarely.
constexpr int kConnectMs = 3000;
// A connection that answers no ping within the timeout is closed, and its calls are repeated on a
// new one. Idle connections ping too: if a server is gone, a step finds that out once, not once for
// each connection in turn. gRPC also sets TCP_USER_TIMEOUT to the timeout: the kernel closes a
// connection whose peer takes no bytes, and so releases the payloads that it references.
constexpr int kKeepaliveMs = 4'000, kKeepaliveTimeoutMs = 7'000;

absl::Status OptionError(std::string_view field, std::string actual, std::string limit) {
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::BAD_REQUEST);
  detail.set_field(std::string(field));
  detail.set_actual(actual);
  detail.set_limit(limit);
  return MakeError(
      absl::StatusCode::kInvalidArgument,
      absl::StrCat("client option ", std::string(field), " is ", actual, "; expected ", limit),
      detail);
}

absl::Status CheckOptions(const ClientOptions& options) {
  if (options.server.empty()) return OptionError("server", "empty", "host:port or unix:/path");
  if (options.connections_per_server < 1 || options.connections_per_server > 16)
    return OptionError("connections_per_server", absl::StrCat(options.connections_per_server),
                       "1 to 16");
  if (options.chunk_bytes < kLeafBytes || options.chunk_bytes > kMaxChunkBytes ||
      options.chunk_bytes % kLeafBytes != 0)
    return OptionError("chunk_bytes", absl::StrCat(options.chunk_bytes), "1, 2, 3 or 4 MiB");
  if (options.control_timeout.count() <= 0 || options.data_timeout.count() <= 0)
    return OptionError("timeout", "0 or less", "more than 0 ms");
  if (!(options.slowest_bytes_per_second > 0))
    return OptionError("slowest_bytes_per_second", absl::StrCat(options.slowest_bytes_per_second),
                       "more than 0");
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  if (!in || !(text << in.rdbuf())) return OptionError("tls", path, "a readable PEM file");
  return text.str();
}

grpc::ChannelArguments ChannelArguments(int connection) {
  grpc::ChannelArguments arguments;
  // client/link/retry.h retries, not gRPC.
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  // No environment variable may redirect training state.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kReconnectFirstMs);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kReconnectLongestMs);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, kConnectMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // Gives each channel its own connection.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kHttp2FrameBytes);
  arguments.SetMaxReceiveMessageSize(
      static_cast<int>(connection < 0 ? kMaxControlMessageBytes : kMaxMessageBytes));
  return arguments;
}

// Returns how long to wait before retry `number`.
Milliseconds WaitFor(Verdict verdict, int number, const RetryOptions& options) {
  if (number == 0 && verdict != Verdict::kBackOff) return Milliseconds(0);
  thread_local std::minstd_rand random(std::random_device{}());
  return BackoffBefore(number, static_cast<uint32_t>(random()), options);
}

}  // namespace

std::chrono::system_clock::time_point SystemDeadline(Clock::time_point deadline) {
  return std::chrono::system_clock::now() +
         std::chrono::duration_cast<std::chrono::system_clock::duration>(deadline - Clock::now());
}

void CancelSet::Add(grpc::ClientContext* context) {
  MutexLock lock(&mutex_);
  contexts_.insert(context);
  if (cancelled_) context->TryCancel();
}

void CancelSet::Remove(grpc::ClientContext* context) {
  MutexLock lock(&mutex_);
  contexts_.erase(context);
}

void CancelSet::CancelAll() {
  MutexLock lock(&mutex_);
  cancelled_ = true;
  for (grpc::ClientContext* context : contexts_) context->TryCancel();
  changed_.SignalAll();
}

bool CancelSet::cancelled() const {
  MutexLock lock(&mutex_);
  return cancelled_;
}

void CancelSet::Sleep(Clock::time_point until) {
  MutexLock lock(&mutex_);
  while (!cancelled_ && Clock::now() < until) changed_.WaitUntil(&mutex_, until);
}

absl::StatusOr<std::shared_ptr<Link>> Link::Create(ClientOptions options) {
  if (absl::Status status = CheckOptions(options); !status.ok()) return status;
  std::shared_ptr<Link> link(new Link(std::move(options)));
  if (absl::Status status = link->ReadCredentials(); !status.ok()) return status;
  return link;
}

Link::Link(ClientOptions options) : options_(std::move(options)), budget_(options_.retry) {}

absl::Status Link::ReadCredentials() {
  const TlsFiles& tls = options_.tls;
  if (tls.certificate.empty() && tls.key.empty() && tls.authority.empty()) {
    credentials_ = grpc::InsecureChannelCredentials();
    return absl::OkStatus();
  }
  grpc::SslCredentialsOptions ssl;
  const std::pair<const std::string&, grpc::string&> files[] = {
      {tls.certificate, ssl.pem_cert_chain},
      {tls.key, ssl.pem_private_key},
      {tls.authority, ssl.pem_root_certs}};
  for (const auto& [path, text] : files) {
    if (path.empty())
      return OptionError("tls", "incomplete", "certificate, key and authority, or none of them");
    absl::StatusOr<std::string> read = ReadFile(path);
    if (!read.ok()) return read.status();
    text = *std::move(read);
  }
  credentials_ = grpc::SslCredentials(ssl);
  return absl::OkStatus();
}

std::shared_ptr<grpc::Channel> Link::ChannelTo(const std::string& address, int connection) {
  MutexLock lock(&mutex_);
  std::shared_ptr<grpc::Channel>& channel = channels_[{address, connection}];
  if (channel == nullptr)
    channel = grpc::CreateCustomChannel(address, credentials_, ChannelArguments(connection));
  return channel;
}

void Link::SetServers(std::vector<v1::ServerInfo> servers) {
  MutexLock lock(&mutex_);
  for (const v1::ServerInfo& server : servers)
    if (server.leader()) leader_address_ = server.address();
  servers_ = std::move(servers);
}

std::vector<v1::ServerInfo> Link::servers() const {
  MutexLock lock(&mutex_);
  return servers_;
}

std::string Link::AddressOf(std::string_view where) const {
  MutexLock lock(&mutex_);
  if (where == kAny) return options_.server;
  if (where == kLeader) return leader_address_.empty() ? options_.server : leader_address_;
  for (const v1::ServerInfo& server : servers_)
    if (server.name() == where) return server.address();
  return std::string(where);  // a server's name is its address in --peers
}

bool Link::PrepareRetry(Verdict verdict, int number, Clock::time_point deadline,
                        CancelSet* cancels) {
  if (verdict == Verdict::kGiveUp || cancels->cancelled()) return false;
  const Clock::time_point now = Clock::now();
  const Clock::time_point until = now + WaitFor(verdict, number, options_.retry);
  if (until >= deadline || !budget_.Spend(now)) return false;
  cancels->Sleep(until);
  return !cancels->cancelled();
}

absl::Status Link::CallWithRetries(Rpc rpc, std::string_view where, std::string_view subject,
                                   Milliseconds timeout, const Attempt& attempt) {
  const Clock::time_point deadline = Clock::now() + timeout;
  CancelSet never;
  std::string address = AddressOf(where);
  for (int number = 0;; ++number) {
    grpc::ClientContext context;
    context.set_deadline(SystemDeadline(deadline));
    absl::Status status = FromGrpc(attempt(ChannelTo(address, -1), &context));
    if (status.ok()) return status;
    const Verdict verdict = Judge(rpc, status);
    if (verdict == Verdict::kRefresh || !PrepareRetry(verdict, number, deadline, &never)) {
      v1::ErrorDetail who;
      who.set_server(address);
      const std::string context_text = absl::StrCat("server ", address, ", ", std::string(subject));
      return Annotated(status, context_text,
                       DetailOf(status).server().empty() ? who : v1::ErrorDetail());
    }
    if (verdict == Verdict::kFollow) {
      address = AddressOf(DetailOf(status).server());
      MutexLock lock(&mutex_);
      leader_address_ = address;
    } else {
      address = AddressOf(where);
    }
  }
}

}  // namespace orlop::client
