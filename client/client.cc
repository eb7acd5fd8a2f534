#include "client/client.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "client/link/link.h"
#include "client/link/manifest.h"
#include "client/link/options.h"
#include "client/link/pages.h"
#include "client/link/parts.h"
#include "client/link/retry.h"
#include "client/session.h"
#include "orlop/v1/admin.grpc.pb.h"
#include "orlop/v1/admin.pb.h"
#include "orlop/v1/job.grpc.pb.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/types.pb.h"

namespace orlop::client {
namespace {

constexpr Milliseconds kLookTimeout = std::chrono::seconds(5);
constexpr Milliseconds kFlushTimeout = std::chrono::hours(1);  // a server writes 0.5 GB/s or so

std::string JobSubject(std::string_view job) { return absl::StrCat("job ", std::string(job)); }

}  // namespace

Client::Client(std::shared_ptr<Link> link) : link_(std::move(link)) {}
Client::~Client() = default;

absl::StatusOr<std::unique_ptr<Client>> Client::Connect(ClientOptions options) {
  const Milliseconds timeout = options.connect_timeout;
  absl::StatusOr<std::shared_ptr<Link>> link = Link::Create(std::move(options));
  if (!link.ok()) return link.status();
  auto response = (*link)->Call<v1::Admin>(Rpc::kRead, Link::kAny, "connecting",
                                           &v1::Admin::StubInterface::ListServers,
                                           v1::ListServersRequest(), timeout);
  if (!response.ok()) return response.status();
  (*link)->SetServers(
      {response->placement().servers().begin(), response->placement().servers().end()});
  return std::unique_ptr<Client>(new Client(*std::move(link)));
}

absl::StatusOr<std::unique_ptr<Session>> Client::CreateJob(const JobSpec& spec) {
  const std::vector<v1::CreateJobRequest> pages = CreatePages(spec);
  absl::StatusOr<v1::CreateJobResponse> response;
  for (const v1::CreateJobRequest& page : pages) {
    response = link_->Call<v1::Job>(Rpc::kChange, Link::kLeader, JobSubject(spec.job),
                                    &v1::Job::StubInterface::CreateJob, page);
    if (!response.ok()) return response.status();
  }
  return Session::Open(link_, spec.job, response->existed());
}

absl::StatusOr<std::unique_ptr<Session>> Client::AttachJob(std::string_view job) {
  return Session::Open(link_, job, true);
}

absl::StatusOr<bool> Client::DeleteJob(std::string_view job) {
  v1::DeleteJobRequest request;
  request.set_job(std::string(job));
  request.set_confirm(std::string(job));
  auto response = link_->Call<v1::Job>(Rpc::kChange, Link::kLeader, JobSubject(job),
                                       &v1::Job::StubInterface::DeleteJob, request);
  if (!response.ok()) return response.status();
  return response->existed();
}

absl::StatusOr<v1::JobStatusResponse> Client::JobStatus(std::string_view job) {
  v1::JobStatusRequest request;
  request.set_job(std::string(job));
  return link_->Call<v1::Job>(Rpc::kRead, Link::kLeader, JobSubject(job),
                              &v1::Job::StubInterface::JobStatus, request);
}

absl::StatusOr<v1::AcceptRollbackResponse> Client::AcceptRollback(std::string_view job,
                                                                  int64_t to_step) {
  v1::AcceptRollbackRequest request;
  request.set_job(std::string(job));
  request.set_to_step(to_step);
  return link_->Call<v1::Admin>(Rpc::kChange, Link::kLeader, JobSubject(job),
                                &v1::Admin::StubInterface::AcceptRollback, request);
}

absl::StatusOr<v1::FlushJobResponse> Client::FlushJob(std::string_view job) {
  v1::FlushJobRequest request;
  request.set_job(std::string(job));
  return link_->Call<v1::Admin>(Rpc::kChange, Link::kLeader, JobSubject(job),
                                &v1::Admin::StubInterface::FlushJob, request, kFlushTimeout);
}

absl::StatusOr<std::vector<v1::ServerInfo>> Client::ListServers() {
  auto response =
      link_->Call<v1::Admin>(Rpc::kRead, Link::kAny, "list of servers",
                             &v1::Admin::StubInterface::ListServers, v1::ListServersRequest());
  if (!response.ok()) return response.status();
  std::vector<v1::ServerInfo> servers(response->placement().servers().begin(),
                                      response->placement().servers().end());
  link_->SetServers(servers);
  return servers;
}

absl::StatusOr<std::vector<v1::JobStatusResponse>> Client::ListJobs() {
  auto response =
      link_->Call<v1::Admin>(Rpc::kRead, Link::kAny, "list of jobs",
                             &v1::Admin::StubInterface::ListJobs, v1::ListJobsRequest());
  if (!response.ok()) return response.status();
  return std::vector<v1::JobStatusResponse>(response->jobs().begin(), response->jobs().end());
}

absl::StatusOr<std::vector<v1::TensorSummary>> Client::ListTensors(std::string_view job,
                                                                   std::string_view name_contains) {
  v1::ListTensorsRequest request;
  request.set_job(std::string(job));
  request.set_name_contains(std::string(name_contains));
  std::vector<v1::TensorSummary> tensors;
  do {
    auto page = link_->Call<v1::Admin>(Rpc::kRead, Link::kAny, JobSubject(job),
                                       &v1::Admin::StubInterface::ListTensors, request);
    if (!page.ok()) return page.status();
    std::move(page->mutable_tensors()->begin(), page->mutable_tensors()->end(),
              std::back_inserter(tensors));
    request.set_first(page->next());
  } while (request.first() != 0);
  return tensors;
}

absl::StatusOr<v1::DescribeTensorResponse> Client::DescribeTensor(std::string_view job,
                                                                  std::string_view tensor) {
  v1::DescribeTensorRequest request;
  request.set_job(std::string(job));
  request.set_tensor(std::string(tensor));
  v1::DescribeTensorResponse whole;
  do {
    auto page = link_->Call<v1::Admin>(Rpc::kRead, Link::kAny,
                                       absl::StrCat(JobSubject(job), ", tensor ", request.tensor()),
                                       &v1::Admin::StubInterface::DescribeTensor, request);
    if (!page.ok()) return page.status();
    request.set_first_shard(page->next_shard());
    whole.MergeFrom(*page);
  } while (request.first_shard() != 0);
  whole.clear_next_shard();
  return whole;
}

absl::StatusOr<v1::ServerStatusResponse> Client::ServerStatus(std::string_view server_name) {
  return link_->Call<v1::Admin>(Rpc::kRead, server_name, "server status",
                                &v1::Admin::StubInterface::ServerStatus, v1::ServerStatusRequest(),
                                kLookTimeout);
}

}  // namespace orlop::client
