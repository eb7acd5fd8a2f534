#include "cli/context.h"

#include <cstdio>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "cli/print/print.h"
#include "client/client.h"
#include "orlop/v1/types.pb.h"
#include "proto/status.h"

namespace orlop::cli {
namespace {

// Returns what a person could try next; empty: the message is enough.
std::string Advice(const Context& context, const absl::Status& status) {
  const v1::ErrorDetail detail = DetailOf(status);
  const std::string& server = context.options.server;
  if (!absl::StrContains(server, ':'))
    return "An address is HOST:PORT or unix:/PATH, for example 127.0.0.1:7070.";
  switch (detail.reason()) {
    case v1::ErrorDetail::UNKNOWN_JOB:
      return "`orlop jobs` lists the jobs.";
    case v1::ErrorDetail::UNKNOWN_TENSOR:
      return "`orlop tensors JOB` lists the tensors.";
    case v1::ErrorDetail::ROLLBACK_OFFERED:
      return absl::StrCat("`orlop rollback ", detail.job().empty() ? "JOB" : detail.job(),
                          " --to-step ", detail.version(), "` accepts the loss of later steps.");
    default:
      break;
  }
  if (status.code() == absl::StatusCode::kUnavailable ||
      status.code() == absl::StatusCode::kDeadlineExceeded)
    return absl::StrCat(
        "Is a server running there? Start one with `orlopd --listen ", server,
        " --data-dir DIRECTORY`,\nor name another with --server HOST:PORT or ORLOP_SERVER.");
  return "";
}

}  // namespace

int Fail(const Context& context, const absl::Status& status) {
  const std::string advice = Advice(context, status);
  std::fprintf(stderr, "orlop: %s\n%s%s", std::string(status.message()).c_str(), advice.c_str(),
               advice.empty() ? "" : "\n");
  return kFailed;
}

absl::StatusOr<std::string> OnlyJob(client::Client* client, const std::string& job) {
  if (!job.empty()) return job;
  const auto jobs = client->ListJobs();
  if (!jobs.ok()) return jobs.status();
  if (jobs->size() == 1) return jobs->front().job();
  std::string names;
  for (const auto& each : *jobs) absl::StrAppend(&names, names.empty() ? "" : ", ", each.job());
  return absl::FailedPreconditionError(
      jobs->empty() ? "there is no job yet"
                    : absl::StrCat("there are several jobs; name one with --job: ", names));
}

}  // namespace orlop::cli
