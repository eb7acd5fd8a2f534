// The C++ client of Orlop. Workers and the `orlop` command reach a cluster only through it.
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
#include "client/link/options.h"  // IWYU pragma: export
#include "client/session.h"       // IWYU pragma: export
#include "orlop/v1/admin.pb.h"

namespace orlop::client {

// Threads: every method may be called from any thread. A Session shares the connections and keeps
// them alive, so the Client may be destroyed first. Lists are complete: the client fetches all
// their pages. Errors of every method: the code and ErrorDetail of the server's answer, as in
// client/session.h.
class Client {
 public:
  // Connects to one server of the cluster and reads the list of the others from it. Status:
  // InvalidArgument if an option is out of range; Unavailable or DeadlineExceeded, naming the
  // address, if the server does not answer.
  static absl::StatusOr<std::unique_ptr<Client>> Connect(ClientOptions options);
  ~Client();

  // Creates the job, or attaches to it if a job with the same manifest exists (Session::existed).
  // Status: AlreadyExists if the job exists with another manifest.
  absl::StatusOr<std::unique_ptr<Session>> CreateJob(const JobSpec& spec);
  // Attaches to an existing job. Status: NotFound, naming the job.
  absl::StatusOr<std::unique_ptr<Session>> AttachJob(std::string_view job);
  // Deletes the job and all its state on every server. Returns whether the job existed.
  absl::StatusOr<bool> DeleteJob(std::string_view job);
  absl::StatusOr<v1::JobStatusResponse> JobStatus(std::string_view job);
  absl::StatusOr<v1::AcceptRollbackResponse> AcceptRollback(std::string_view job, int64_t to_step);
  // Has the committed step of the job written to the disks of its servers, and waits until it is
  // there, at most an hour.
  absl::StatusOr<v1::FlushJobResponse> FlushJob(std::string_view job);

  absl::StatusOr<std::vector<v1::ServerInfo>> ListServers();
  absl::StatusOr<std::vector<v1::JobStatusResponse>> ListJobs();
  absl::StatusOr<std::vector<v1::TensorSummary>> ListTensors(std::string_view job,
                                                             std::string_view name_contains = "");
  absl::StatusOr<v1::DescribeTensorResponse> DescribeTensor(std::string_view job,
                                                            std::string_view tensor);
  // Returns the status of the server named `server_name` (ServerInfo.name). If the name is empty,
  // of the server this client connected to.
  absl::StatusOr<v1::ServerStatusResponse> ServerStatus(std::string_view server_name = "");

 private:
  explicit Client(std::shared_ptr<Link> link);
  std::shared_ptr<Link> link_;
};

}  // namespace orlop::client
