// PeerLinks has the connections to all servers of the cluster, this one included. Only PutJob and
// DropJob wait for an answer.
//   Threads  All methods are safe from any thread.
#pragma once

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "orlop/v1/admin.grpc.pb.h"
#include "orlop/v1/peer.grpc.pb.h"

namespace orlop::server {

// A PeerAddress is one server of the cluster, as --peers lists it.
struct PeerAddress {
  std::string name;          // never changes, because placements name it; by default the address
  std::string address;       // of its door for workers: host:port or unix:/path
  std::string peer_address;  // of its door for the other servers
};

class PeerLinks {
 public:
  // `peers` are all servers of the cluster, sorted by name. The methods below name a server by its
  // index in `peers`. `credentials` are those of this server (mutual TLS or none). The constructor
  // does not connect.
  PeerLinks(std::vector<PeerAddress> peers,
            const std::shared_ptr<grpc::ChannelCredentials>& credentials);
  ~PeerLinks();  // waits until every message of Send is answered or has failed, at most 5 s each

  // What becomes of a message of Send: the answer of the server, or why it could not be sent.
  using OnAnswer =
      std::function<void(int server, const v1::StepMessage& message, const absl::Status& answer)>;
  // Sets the callback for the answers. It runs on a thread of gRPC and must not wait.
  void SetOnAnswer(OnAnswer callback);

  // Sends one message of a step machine. Does not wait. The message is given up after 5 s.
  void Send(int to, v1::StepMessage message);

  // Make one call of the service Peer (proto/orlop/v1/peer.proto) and wait for its answer, 30 s at
  // most.
  //   Status  that of the server, or DeadlineExceeded or Unavailable if it does not answer; the
  //           message and the detail name the server
  absl::Status PutJob(int to, const v1::JobDefinition& definition);
  absl::Status DropJob(int to, const std::string& job);

  // Asks a server for the shards of a tensor. Does not wait: `next` gets the answer within 5 s, on
  // a thread of gRPC, and must not wait.
  //   Status  as PutJob
  void DescribeShards(int to, const v1::DescribeTensorRequest& request,
                      const std::function<void(absl::StatusOr<v1::DescribeTensorResponse>)>& next);

  // What is known of a server.
  struct Seen {
    v1::ServerInfo info;  // as of its last answer; without incarnation if it never answered
    // OK: it answered when it was asked last. Else why it did not.
    absl::Status status = absl::UnavailableError("has not been asked yet");
    std::chrono::steady_clock::time_point answered;  // its last answer; the start if there is none
    std::chrono::steady_clock::time_point asked;     // that `status` is of; the start if none
  };
  // Whether a question fails at once while a link has no connection, or waits for the next try to
  // make one. Tries are up to a second apart.
  enum Patience : uint8_t { kAtOnce, kUntilConnected };
  // Asks a server who it is. Does not wait: `next` gets what is known of it then, within 2 seconds,
  // on a thread of gRPC, and must not wait.
  void Look(int at, const std::function<void(Seen)>& next, Patience patience = kAtOnce);
  // What is known of a server now.
  Seen LastSeen(int server) const;

  // The stub for calls of the service Admin. It lives as long as this object.
  v1::Admin::Stub* admin(int to) { return links_[to].admin.get(); }
  const PeerAddress& address(int server) const { return addresses_[server]; }

 private:
  struct Link {
    std::shared_ptr<grpc::Channel> channel;
    std::unique_ptr<v1::Peer::Stub> peer;
    std::unique_ptr<v1::Admin::Stub> admin;
  };
  absl::Status Named(int to, const grpc::Status& status) const;

  // What the ends of calls use. They may be at their last instruction when this object is gone.
  struct Calls {
    Mutex mutex;
    CondVar idle;
    int under_way GUARDED_BY(mutex) = 0;
    OnAnswer on_answer GUARDED_BY(mutex);
    std::vector<Seen> seen GUARDED_BY(mutex);  // by server
  };
  void Begin();
  static void End(Calls* calls);

  const std::vector<PeerAddress> addresses_;
  std::vector<Link> links_;
  const std::shared_ptr<Calls> calls_ = std::make_shared<Calls>();
};

}  // namespace orlop::server
