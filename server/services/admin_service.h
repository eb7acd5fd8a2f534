// The service v1::Admin: it shows servers, jobs, tensors and shards, accepts rollbacks, and has
// jobs written to disk. The step leader answers ListServers, ListJobs, AcceptRollback and FlushJob;
// other servers forward them to it.
//   Threads  one for each call in progress.
//   Status   as admin.proto says.
#pragma once

#include <functional>

#include "orlop/v1/admin.grpc.pb.h"
#include "server/runtime/job_table.h"

namespace orlop::server {

// Facts of the process that ServerStatus returns.
struct ServerFacts {
  std::chrono::steady_clock::time_point started;
  uint64_t baseline_bytes = 0;  // ResidentBytes() when the server listened and had opened no job
  std::string data_dir;
};

class AdminService : public v1::Admin::Service {
 public:
  // `jobs` and `accountant` must outlive the service. `identity`: this server as ListServers shows
  // it. Both functions are called by several threads at once.
  AdminService(JobTable* jobs, Accountant* accountant, std::function<v1::ServerInfo()> identity,
               std::function<ServerFacts()> facts)
      : jobs_(jobs),
        accountant_(accountant),
        identity_(std::move(identity)),
        facts_(std::move(facts)) {}

  grpc::Status ListServers(grpc::ServerContext*, const v1::ListServersRequest*,
                           v1::ListServersResponse*) override;
  grpc::Status ListJobs(grpc::ServerContext*, const v1::ListJobsRequest*,
                        v1::ListJobsResponse*) override;
  grpc::Status ListTensors(grpc::ServerContext*, const v1::ListTensorsRequest*,
                           v1::ListTensorsResponse*) override;
  grpc::Status DescribeTensor(grpc::ServerContext*, const v1::DescribeTensorRequest*,
                              v1::DescribeTensorResponse*) override;
  grpc::Status ServerStatus(grpc::ServerContext*, const v1::ServerStatusRequest*,
                            v1::ServerStatusResponse*) override;
  grpc::Status AcceptRollback(grpc::ServerContext*, const v1::AcceptRollbackRequest*,
                              v1::AcceptRollbackResponse*) override;
  grpc::Status FlushJob(grpc::ServerContext*, const v1::FlushJobRequest*,
                        v1::FlushJobResponse*) override;

 private:
  JobTable* const jobs_;
  Accountant* const accountant_;
  const std::function<v1::ServerInfo()> identity_;
  const std::function<ServerFacts()> facts_;
};

}  // namespace orlop::server
