// Connections to the other servers of the cluster. Messages of the step machines are sent without
// waiting: whatever is lost, the machines send again.
//   Threads  all methods are safe from any thread.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "base/mutex.h"
#include "orlop/v1/admin.grpc.pb.h"
#include "orlop/v1/job.grpc.pb.h"
#include "orlop/v1/peer.grpc.pb.h"

namespace orlop::server {

// One server of the cluster, as listed in --peers.
struct PeerAddress {
  std::string name;     // stable: placement refers to it; the address where no name is given
  std::string address;  // host:port or unix:/path
};

class PeerLinks {
 public:
  // `peers` are sorted by name; an index names a server below. `credentials` are those that the
  // server itself uses (mutual TLS or none).
  PeerLinks(std::vector<PeerAddress> peers, std::shared_ptr<grpc::ChannelCredentials> credentials);
  ~PeerLinks();  // waits for messages under way

  // Called when a server answers that it does not know the job: the leader then sends the
  // definition.
  void OnUnknownJob(std::function<void(int server, const std::string& job)> callback);

  void Send(int to, v1::StepMessage message);
  absl::Status PutJob(int to, const v1::JobDefinition& definition);
  absl::Status DropJob(int to, const std::string& job);
  absl::StatusOr<v1::ServerInfo> Identify(int to);
  absl::StatusOr<v1::DescribeTensorResponse> DescribeShards(
      int to, const v1::DescribeTensorRequest& request);
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

  const std::vector<PeerAddress> addresses_;
  std::vector<Link> links_;
  Mutex mutex_;
  CondVar idle_;
  int under_way_ GUARDED_BY(mutex_) = 0;
  std::function<void(int, const std::string&)> on_unknown_job_ GUARDED_BY(mutex_);
};

}  // namespace orlop::server
