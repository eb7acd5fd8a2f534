// The C++ client of Orlop: the only door for workers and for the `orlop` command.
//
//   auto client = Client::Connect({.server = "127.0.0.1:7070"});
//   auto session = (*client)->CreateJob({.job = "demo", .tensors = {...}});
//   (*session)->ConfigureOptimizer(...);
//   auto generation = (*session)->StartGeneration(1);
//   (*session)->Join({.generation = *generation});
//   (*session)->SetState({{.tensor = 0, .data = bytes}});
//   (*session)->Commit({.kind = v1::CommitStepRequest::LOAD});
//   loop: Push gradients, Commit with the learning rate, Pull weights.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/link/options.h"
#include "client/session.h"
#include "orlop/v1/admin.pb.h"

namespace orlop::client {

// Threads: every method may be called from any thread. Sessions keep what they need alive: the
// client may go first. Lists are whole: pages are fetched here.
class Client {
 public:
  // Reaches one server and learns the others from it. Statuses: InvalidArgument (options),
  // Unavailable or DeadlineExceeded naming the address.
  static absl::StatusOr<std::unique_ptr<Client>> Connect(ClientOptions options);
  ~Client();

  // Creates the job, or attaches to it when its manifest is the same (Session::existed).
  // AlreadyExists: another manifest.
  absl::StatusOr<std::unique_ptr<Session>> CreateJob(const JobSpec& spec);
  // Attaches to an existing job. NotFound names it.
  absl::StatusOr<std::unique_ptr<Session>> AttachJob(std::string_view job);
  absl::StatusOr<bool> DeleteJob(std::string_view job);  // true if there was one
  absl::StatusOr<v1::JobStatusResponse> JobStatus(std::string_view job);
  absl::StatusOr<v1::AcceptRollbackResponse> AcceptRollback(std::string_view job, int64_t to_step);

  absl::StatusOr<std::vector<v1::ServerInfo>> ListServers();
  absl::StatusOr<std::vector<v1::JobStatusResponse>> ListJobs();
  absl::StatusOr<std::vector<v1::TensorSummary>> ListTensors(std::string_view job,
                                                             std::string_view name_contains = "");
  absl::StatusOr<v1::DescribeTensorResponse> DescribeTensor(std::string_view job,
                                                            std::string_view tensor);
  // Of the server with that name (ServerInfo.name); empty: the one connected to.
  absl::StatusOr<v1::ServerStatusResponse> ServerStatus(std::string_view server_name = "");

 private:
  explicit Client(std::shared_ptr<Link> link);
  std::shared_ptr<Link> link_;
};

}  // namespace orlop::client
