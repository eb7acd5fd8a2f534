// The service v1::Admin: it shows servers, jobs, tensors and shards, accepts rollbacks, and has
// jobs written to disk. The step leader answers ListJobs, AcceptRollback and FlushJob; other
// servers forward them to it.
//   Threads  a call that waits for other servers holds none.
//   Status   as admin.proto says.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "orlop/v1/admin.pb.h"
#include "server/memory/accountant.h"
#include "server/runtime/job_table.h"
#include "server/services/gate.h"

namespace orlop::server {

// Facts of the process that ServerStatus returns.
struct ServerFacts {
  std::chrono::steady_clock::time_point started;
  uint64_t baseline_bytes = 0;  // ResidentBytes() when the server listened and had opened no job
  std::string data_dir;
};

class AdminService final {
 public:
  // `jobs` and `accountant` must outlive the service. `identity`: this server as ListServers shows
  // it. Both functions are called by several threads at once.
  AdminService(JobTable* jobs, Accountant* accountant, std::function<v1::ServerInfo()> identity,
               std::function<ServerFacts()> facts)
      : jobs_(jobs),
        accountant_(accountant),
        identity_(std::move(identity)),
        facts_(std::move(facts)) {}

  // Adds the RPCs of the service, which must outlive `rpcs`.
  void AddTo(Rpcs* rpcs);

 private:
  void ListServers(Call* call, const v1::ListServersRequest& request,
                   v1::ListServersResponse* response);
  void ListJobs(Call* call, const v1::ListJobsRequest& request, v1::ListJobsResponse* response);
  absl::Status ListTensors(const v1::ListTensorsRequest& request,
                           v1::ListTensorsResponse* response);
  void DescribeTensor(Call* call, const v1::DescribeTensorRequest& request,
                      v1::DescribeTensorResponse* response);
  void ServerStatus(Call* call, const v1::ServerStatusRequest& request,
                    v1::ServerStatusResponse* response);
  void AcceptRollback(Call* call, const v1::AcceptRollbackRequest& request,
                      v1::AcceptRollbackResponse* response);
  void FlushJob(Call* call, const v1::FlushJobRequest& request, v1::FlushJobResponse* response);

  JobTable* const jobs_;
  Accountant* const accountant_;
  const std::function<v1::ServerInfo()> identity_;
  const std::function<ServerFacts()> facts_;
};

}  // namespace orlop::server
