// PeerLinks has the connections to all servers of the cluster, this one included. Send does not
// wait for an answer and does not report errors: the step machines repeat a message that may be
// lost. The other calls wait for their answer.
//   Threads  All methods are safe from any thread.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "orlop/v1/admin.grpc.pb.h"
#include "orlop/v1/job.grpc.pb.h"
#include "orlop/v1/peer.grpc.pb.h"

namespace orlop::server {

// A PeerAddress is one server of the cluster, as --peers lists it.
struct PeerAddress {
  std::string name;     // never changes, because placements name it; by default the address
  std::string address;  // host:port or unix:/path
};

class PeerLinks {
 public:
  // `peers` are all servers of the cluster, sorted by name. The methods below name a server by its
  // index in `peers`. `credentials` are those of this server (mutual TLS or none). The constructor
  // does not connect.
  PeerLinks(std::vector<PeerAddress> peers,
            const std::shared_ptr<grpc::ChannelCredentials>& credentials);
  ~PeerLinks();  // waits until every message of Send is answered or has failed, at most 5 s each

  // Sets the callback for messages of Send that a server has answered with NotFound: it does not
  // know the job, so the leader sends it the definition. The callback runs on a thread of gRPC and
  // must not wait.
  void OnUnknownJob(std::function<void(int server, const std::string& job)> callback);

  // Sends one message of a step machine. Does not wait. The message is given up after 5 s.
  void Send(int to, v1::StepMessage message);

  // Make one call of the service Peer (proto/orlop/v1/peer.proto) and wait for its answer: PutJob
  // and DropJob 30 s at most, DescribeShards 5 s, Identify 2 s.
  //   Status  that of the server, or DeadlineExceeded or Unavailable if it does not answer; the
  //           message and the detail name the server
  absl::Status PutJob(int to, const v1::JobDefinition& definition);
  absl::Status DropJob(int to, const std::string& job);
  absl::StatusOr<v1::ServerInfo> Identify(int to);
  absl::StatusOr<v1::DescribeTensorResponse> DescribeShards(
      int to, const v1::DescribeTensorRequest& request);

  // Stubs for other calls to a server. They live as long as this object.
  v1::Admin::Stub* admin(int to) { return links_[to].admin.get(); }
  v1::Job::Stub* job(int to) { return links_[to].job.get(); }
  const PeerAddress& address(int server) const { return addresses_[server]; }

 private:
  struct Link {
    std::unique_ptr<v1::Peer::Stub> peer;
    std::unique_ptr<v1::Admin::Stub> admin;
    std::unique_ptr<v1::Job::Stub> job;
  };
  absl::Status Named(int to, const grpc::Status& status) const;

  // What the ends of calls use. They may be at their last instruction when this object is gone.
  struct Calls {
    Mutex mutex;
    CondVar idle;
    int under_way GUARDED_BY(mutex) = 0;
    std::function<void(int, const std::string&)> on_unknown_job GUARDED_BY(mutex);
  };

  const std::vector<PeerAddress> addresses_;
  std::vector<Link> links_;
  const std::shared_ptr<Calls> calls_ = std::make_shared<Calls>();
};

}  // namespace orlop::server
