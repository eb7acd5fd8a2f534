// The gate of a door: every RPC comes through it. It knows the rule of each RPC, counts what a
// request takes before it parses it, and gives the call to its handler. An RPC without a rule does
// not exist.
//
// A handler runs on one of the few threads that the gates of a server share. It must not wait there
// for workers or other servers: it asks, and gives what is to be done with the answer. So a call
// that waits holds no thread.
#pragma once

#include <google/protobuf/message.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/grpcpp.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/handover.h"
#include "base/mutex.h"
#include "base/thread_pool.h"
#include "proto/parse_bound.h"
#include "server/memory/request_room.h"
#include "server/runtime/job_table.h"
#include "server/services/arrivals.h"
#include "server/services/roles.h"

namespace orlop::server {

class Gate;
class Rpcs;
struct Rpc;

// Returns the bytes of a response.
grpc::ByteBuffer Serialized(const google::protobuf::Message& message);

// The request that a call waits for. It outlives the call, which may end while it is begun.
//   Threads  any
class Pending {
 public:
  int Begin();
  // `withdraw` ends the wait of request number `request`, unless another one has begun since.
  void Set(int request, std::function<void()> withdraw);
  void Cancel();

 private:
  Mutex mutex_;
  int requests_ GUARDED_BY(mutex_) = 0;
  bool is_cancelled_ GUARDED_BY(mutex_) = false;
  std::function<void()> withdraw_ GUARDED_BY(mutex_);
};

// A call whose callbacks run on the threads that libgrpc chooses, one after the other. The thread
// sanitizer does not see how libgrpc hands it on, so each callback calls TellTaken(this) first.
class Reactor : public grpc::ServerGenericBidiReactor {
 protected:
  void StartRead(grpc::ByteBuffer* message) {
    TellGiven(this);
    grpc::ServerGenericBidiReactor::StartRead(message);
  }
  void StartWrite(const grpc::ByteBuffer* message) {
    TellGiven(this);
    grpc::ServerGenericBidiReactor::StartWrite(message);
  }
  void StartWriteAndFinish(const grpc::ByteBuffer* message) {
    TellGiven(this);
    grpc::ServerGenericBidiReactor::StartWriteAndFinish(message, grpc::WriteOptions(),
                                                        grpc::Status::OK);
  }
  void Finish(const grpc::Status& status) {
    TellGiven(this);
    grpc::ServerGenericBidiReactor::Finish(status);
  }
  bool was_cancelled() const { return was_cancelled_; }

 private:
  void OnCancel() final {
    TellTaken(this);
    was_cancelled_ = true;
    Cancelled();
  }
  virtual void Cancelled() {}

  std::atomic<bool> was_cancelled_ = false;
};

// One unary call. Its gate makes it; it deletes itself after its end.
//   Threads  The handler's until it asks; then the one that runs `next`, and so on.
class Call final : public Reactor {
 public:
  // The call waits until its own deadline, but at most ten minutes.
  std::chrono::steady_clock::time_point deadline() const { return deadline_; }
  // Whether the client has gone away.
  bool IsCancelled() const { return context_->IsCancelled(); }
  // Counts bytes that the call holds until its end, besides its request.
  //   Status  as RequestRoom::Take
  absl::Status Hold(uint64_t bytes);
  // Whether the caller may see a job.
  bool MaySee(std::string_view job) const;
  bool IsOperator(std::string_view job) const;
  // The caller's name, as Identity::name.
  const std::string& caller() const { return identity_->name; }
  // Run the handlers of calls.
  ThreadPool* threads() const;
  // For a call that this server makes on behalf of the client, with its deadline.
  std::unique_ptr<grpc::ClientContext> Onward() const;

  // Begins a request at the job's leader, and calls `next` with the answer: here, or later in
  // another thread. `next` asks again or ends the call. A client that goes away withdraws the
  // request. Nothing may touch the call after Ask.
  void Ask(const std::shared_ptr<JobRuntime>& job,
           const std::function<step::RequestId(LeaderShell&, Caller)>& ask,
           std::function<void(absl::StatusOr<step::Answer>)> next);
  // Ends the call; the response is sent if `status` is OK. Nothing may touch the call after it.
  void End(const absl::Status& status);

 private:
  friend class Gate;

  // `rpc` null: the call is about to end.
  Call(Gate* gate, grpc::GenericCallbackServerContext* context, const Rpc* rpc);
  ~Call() override;

  void OnReadDone(bool is_read) override;
  void Handle();
  void Cancelled() override { pending_->Cancel(); }
  void OnDone() override;

  Gate* const gate_;
  grpc::GenericCallbackServerContext* const context_;
  const std::chrono::steady_clock::time_point deadline_;
  const int lane_;  // see Arrivals
  const Rpc* const rpc_;
  std::shared_ptr<const Identity> identity_;
  grpc::ByteBuffer bytes_;  // of the request, then of the response
  RequestRoom::Held request_room_, response_room_, held_room_;
  std::unique_ptr<google::protobuf::Message> request_, response_;
  const std::shared_ptr<Pending> pending_ = std::make_shared<Pending>();
};

// A call with a stream of messages. An RPC makes it, it begins to read in its constructor, and it
// deletes itself after its end. It holds no thread while it waits for its client.
class StreamCall : public Reactor {
 protected:
  StreamCall(Gate* gate, grpc::GenericCallbackServerContext* context);

  Gate& gate() { return *gate_; }
  // Checks whether the caller may make this call for a job. Call it before anything is done.
  //   Status  PermissionDenied (DENIED)
  absl::Status CheckJob(std::string_view job) const;
  std::chrono::steady_clock::time_point deadline() const { return deadline_; }
  bool IsCancelled() const { return context_->IsCancelled(); }
  // Frame each read and each write: a client that does not send or take one whole message within
  // kMaxStallMs is given up, and within kWantedStallMs if others want what the call holds.
  void BeginTransfer();
  void EndTransfer();
  // Runs a task that may work, on a thread that the streams share. Nothing may touch the call after
  // it.
  void Submit(std::function<void()> task);

 private:
  friend class Gate;
  void OnDone() override;
  // Whether others want what the call holds.
  virtual bool IsWanted() const { return false; }

  Gate* const gate_;
  grpc::GenericCallbackServerContext* const context_;
  const std::chrono::steady_clock::time_point deadline_;
  const int lane_;  // see Arrivals
  std::shared_ptr<const Identity> identity_;
  std::atomic<int64_t> transfer_since_ms_ = 0;  // of the steady clock; 0: none is under way
};

// What is known of one RPC.
struct Rpc {
  const Rule* rule;
  bool may_wait;
  size_t max_bytes;  // of a request
  ParseBound bound;
  std::function<std::unique_ptr<google::protobuf::Message>()> make_request, make_response;
  std::function<void(Call*, const google::protobuf::Message&, google::protobuf::Message*)> handle;
  // Of an RPC with a stream: makes the call. The others are then not used.
  std::function<StreamCall*(Gate*, grpc::GenericCallbackServerContext*)> stream;
};

// The RPCs of a server, by method ("/orlop.v1.Job/Join").
//   Threads  Filled before the doors open; safe from any thread then.
class Rpcs {
 public:
  // Adds an RPC of `service`, which must outlive this object. The handler returns the status with
  // which the call ends.
  template <typename Service, typename Request, typename Response>
  void Add(const std::string& method, Service* service,
           absl::Status (Service::*handler)(const Request&, Response*)) {
    AddRpc<Request, Response>(
        method, /*may_wait=*/false,
        [service, handler](Call* call, const Request& request, Response* response) {
          call->End((service->*handler)(request, response));
        });
  }
  // The handler ends the call, now or in what it asks for.
  template <typename Service, typename Request, typename Response>
  void Add(const std::string& method, Service* service,
           void (Service::*handler)(Call*, const Request&, Response*)) {
    AddRpc<Request, Response>(
        method, /*may_wait=*/true,
        [service, handler](Call* call, const Request& request, Response* response) {
          (service->*handler)(call, request, response);
        });
  }

  // Adds an RPC with a stream. `stream` makes the call.
  void AddStream(const std::string& method,
                 std::function<StreamCall*(Gate*, grpc::GenericCallbackServerContext*)> stream);

  // Returns OK if there is an RPC for every rule, and a rule for every RPC.
  absl::Status Check() const;

 private:
  friend class Gate;

  template <typename Request, typename Response>
  void AddRpc(const std::string& method, bool may_wait,
              std::function<void(Call*, const Request&, Response*)> handler) {
    AddRpc(method,
           {nullptr, may_wait, 0, ParseBound(Request::default_instance()),
            [] { return std::make_unique<Request>(); }, [] { return std::make_unique<Response>(); },
            [handler = std::move(handler)](Call* call, const google::protobuf::Message& request,
                                           google::protobuf::Message* response) {
              handler(call, static_cast<const Request&>(request), static_cast<Response*>(response));
            },
            nullptr});
  }
  void AddRpc(const std::string& method, Rpc rpc);

  std::map<std::string, std::unique_ptr<const Rpc>, std::less<>> rpcs_;
};

class Gate final : public grpc::CallbackGenericService {
 public:
  // Calls that there is room for beside those that wait and streams: to be answered or refused.
  static constexpr int kSpareCalls = 256;
  struct Options {
    // The roles that count at this door: an RPC that none of them may call does not exist here.
    Roles roles;
    // Returns who has made a connection.
    std::function<std::shared_ptr<const Identity>(const grpc::AuthContext&)> identify;
    // In progress at a time. Calls that may wait and those that do not are counted apart, so that
    // who looks at a server is not kept out by those who wait.
    int max_calls = 0, max_streams = 0;
    ThreadPool* threads = nullptr;  // run the handlers of calls
    ThreadPool* stream_threads = nullptr;
  };
  // `rpcs`, `room` and the threads must outlive the gate, and the gate its door.
  Gate(const Rpcs* rpcs, RequestRoom* room, Options options)
      : rpcs_(rpcs),
        room_(room),
        options_(std::move(options)),
        arrivals_(options_.max_calls + options_.max_streams + kSpareCalls,
                  options_.max_calls / 4 * 3) {}

  grpc::ServerGenericBidiReactor* CreateReactor(
      grpc::GenericCallbackServerContext* context) override;

  // Parses the bytes of a message, after its room is taken. `bytes` is cleared.
  //   Status  InvalidArgument (BAD_REQUEST), or as RequestRoom::Take
  absl::StatusOr<RequestRoom::Held> Parse(grpc::ByteBuffer* bytes, size_t max_bytes,
                                          const ParseBound& bound,
                                          google::protobuf::Message* message);
  RequestRoom& room() { return *room_; }
  // The gate's door counts calls here before they come.
  Arrivals& arrivals() { return arrivals_; }
  ThreadPool* stream_threads() { return options_.stream_threads; }

  // Counts anew; ends streams whose client has sent or taken nothing for kMaxStallMs, and calls
  // whose request has not come within kMaxRequestMs. The server's ticker calls it.
  void Tick();

 private:
  friend class Call;
  friend class StreamCall;
  absl::StatusOr<const Rpc*> Find(const std::string& method);
  absl::Status Check(const Rule& rule, const Identity& identity, std::string_view job) const;

  const Rpcs* const rpcs_;
  RequestRoom* const room_;
  const Options options_;
  Arrivals arrivals_;
  std::atomic<int> calls_[2] = {};  // by may_wait
  Mutex mutex_;
  std::set<StreamCall*> streams_ GUARDED_BY(mutex_);
  std::map<Call*, int64_t> reading_ GUARDED_BY(mutex_);  // calls without their request, since when
};

}  // namespace orlop::server
