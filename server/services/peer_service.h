// The service v1::Peer: calls from the other servers of the cluster.
//   Status   as peer.proto says.
#pragma once

#include <functional>
#include <utility>

#include "absl/status/status.h"
#include "orlop/v1/admin.pb.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "server/runtime/job_table.h"
#include "server/services/gate.h"

namespace orlop::server {

class PeerService final {
 public:
  // `jobs` must outlive the service. `identity`: this server as ListServers shows it; several
  // threads call it at once.
  PeerService(JobTable* jobs, std::function<v1::ServerInfo()> identity)
      : jobs_(jobs), identity_(std::move(identity)) {}

  // Adds the RPCs of the service, which must outlive `rpcs`.
  void AddTo(Rpcs* rpcs);

 private:
  absl::Status PutJob(const v1::JobDefinition& request, v1::PutJobResponse* response);
  absl::Status DropJob(const v1::DropJobRequest& request, v1::DropJobResponse* response);
  absl::Status Step(const v1::StepMessage& request, v1::StepAck* response);
  absl::Status Identify(const v1::IdentifyRequest& request, v1::ServerInfo* response);
  absl::Status DescribeShards(const v1::DescribeTensorRequest& request,
                              v1::DescribeTensorResponse* response);

  JobTable* const jobs_;
  const std::function<v1::ServerInfo()> identity_;
};

}  // namespace orlop::server
