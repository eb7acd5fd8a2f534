// A client's connections to a cluster. A Link knows the servers and the step leader, finds the
// server that a call is for, and retries the call.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "client/link/options.h"
#include "client/link/retry.h"
#include "proto/status.h"

namespace orlop::client {

using Clock = std::chrono::steady_clock;

// The calls in progress that a closing session cancels. Threads: any.
class CancelSet {
 public:
  // If CancelAll has been called, cancels the call at once.
  void Add(grpc::ClientContext* context);
  void Remove(grpc::ClientContext* context);
  void CancelAll();
  bool cancelled() const;
  // Sleeps until `until`, or until CancelAll is called.
  void Sleep(Clock::time_point until);

 private:
  mutable Mutex mutex_;
  CondVar changed_;
  std::set<grpc::ClientContext*> contexts_ GUARDED_BY(mutex_);
  bool cancelled_ GUARDED_BY(mutex_) = false;
};

// Threads: any. No lock is held during a call.
class Link {
 public:
  // The server that this client connected to.
  static constexpr char kAny[] = "";
  static constexpr char kLeader[] = "leader";

  // Status: InvalidArgument, naming the option, its value and its limit.
  static absl::StatusOr<std::shared_ptr<Link>> Create(ClientOptions options);

  const ClientOptions& options() const { return options_; }
  RetryBudget* budget() { return &budget_; }

  // Makes one control call. `where` is kAny, kLeader or a server's name. Retries by
  // client/link/retry.h until the deadline, `timeout` or ClientOptions::control_timeout from now.
  // Errors name the server and `subject` ("job demo").
  template <typename Service, typename Request, typename Response>
  absl::StatusOr<Response> Call(Rpc rpc, std::string_view where, std::string_view subject,
                                grpc::Status (Service::StubInterface::*)(grpc::ClientContext*,
                                                                         const Request&, Response*),
                                const Request& request, std::optional<Milliseconds> timeout = {});

  // Creates the channel on first use and keeps it. Each channel has a TCP connection of its own.
  // `connection` is -1 for control calls and from 0 for data.
  std::shared_ptr<grpc::Channel> ChannelTo(const std::string& address, int connection);

  void SetServers(std::vector<v1::ServerInfo> servers);
  std::vector<v1::ServerInfo> servers() const;

  // Waits before the next try, as long as `verdict` asks. Returns false if the retry budget or the
  // time is used up, or if `cancels` is cancelled; the error is then final.
  bool PrepareRetry(Verdict verdict, int number, Clock::time_point deadline, CancelSet* cancels);

 private:
  using Attempt =
      std::function<grpc::Status(const std::shared_ptr<grpc::Channel>&, grpc::ClientContext*)>;

  explicit Link(ClientOptions options);
  absl::Status ReadCredentials();
  absl::Status CallWithRetries(Rpc rpc, std::string_view where, std::string_view subject,
                               Milliseconds timeout, const Attempt& attempt);
  std::string AddressOf(std::string_view where) const;

  const ClientOptions options_;
  std::shared_ptr<grpc::ChannelCredentials> credentials_;
  RetryBudget budget_;
  mutable Mutex mutex_;
  std::vector<v1::ServerInfo> servers_ GUARDED_BY(mutex_);
  // Empty: unknown. The server that this client connected to will name it.
  std::string leader_address_ GUARDED_BY(mutex_);
  std::map<std::pair<std::string, int>, std::shared_ptr<grpc::Channel>> channels_
      GUARDED_BY(mutex_);
};

// Converts to the system clock, which gRPC's deadlines use.
std::chrono::system_clock::time_point SystemDeadline(Clock::time_point deadline);

template <typename Service, typename Request, typename Response>
absl::StatusOr<Response> Link::Call(
    Rpc rpc, std::string_view where, std::string_view subject,
    grpc::Status (Service::StubInterface::*method)(grpc::ClientContext*, const Request&, Response*),
    const Request& request, std::optional<Milliseconds> timeout) {
  Response response;
  absl::Status status = CallWithRetries(
      rpc, where, subject, timeout.value_or(options_.control_timeout),
      [&](const std::shared_ptr<grpc::Channel>& channel, grpc::ClientContext* context) {
        response.Clear();
        auto stub = Service::NewStub(channel);
        return (static_cast<typename Service::StubInterface*>(stub.get())->*method)(
            context, request, &response);
      });
  if (!status.ok()) return status;
  return response;
}

}  // namespace orlop::client
