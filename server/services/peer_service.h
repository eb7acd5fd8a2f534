// The service v1::Peer: calls from the other servers of the cluster.
//   Threads  one for each call in progress.
//   Status   as peer.proto says.
#pragma once

#include <functional>

#include "orlop/v1/peer.grpc.pb.h"
#include "server/runtime/job_table.h"

namespace orlop::server {

class PeerService : public v1::Peer::Service {
 public:
  // `jobs` must outlive the service. `identity`: this server as ListServers shows it; several
  // threads call it at once.
  PeerService(JobTable* jobs, std::function<v1::ServerInfo()> identity)
      : jobs_(jobs), identity_(std::move(identity)) {}

  grpc::Status PutJob(grpc::ServerContext*, const v1::JobDefinition*, v1::PutJobResponse*) override;
  grpc::Status DropJob(grpc::ServerContext*, const v1::DropJobRequest*,
                       v1::DropJobResponse*) override;
  grpc::Status Step(grpc::ServerContext*, const v1::StepMessage*, v1::StepAck*) override;
  grpc::Status Identify(grpc::ServerContext*, const v1::IdentifyRequest*, v1::ServerInfo*) override;
  grpc::Status DescribeShards(grpc::ServerContext*, const v1::DescribeTensorRequest*,
                              v1::DescribeTensorResponse*) override;

 private:
  JobTable* const jobs_;
  const std::function<v1::ServerInfo()> identity_;
};

}  // namespace orlop::server
