// servers, status, jobs: commands about the whole cluster.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "cli/commands.h"
#include "cli/context.h"
#include "cli/print/json.h"
#include "cli/print/print.h"
#include "cli/print/table.h"
#include "orlop/v1/admin.pb.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/types.pb.h"

namespace orlop::cli {
namespace {

constexpr int kBarWidth = 20, kShareWidth = 12;  // characters

std::string StateName(v1::JobStatusResponse::State state) {
  return v1::JobStatusResponse::State_Name(state);
}

void PrintStatus(const Context& context, const v1::ServerStatusResponse& status) {
  Print(absl::StrCat(status.name(),
                     status.ready() ? "  ready" : absl::StrCat("  not ready: ", status.state()),
                     "  up ", HumanSeconds(status.uptime_seconds()), "  orlopd ", status.version(),
                     "  ", status.instruction_set(), "\n"));
  Print(absl::StrCat(
      "memory  ",
      Bar(status.memory_bytes(), status.memory_budget_bytes(), kBarWidth, context.terminal), "  ",
      HumanBytes(status.memory_bytes()), " of ", HumanBytes(status.memory_budget_bytes()),
      "  (peak ", HumanBytes(status.memory_peak_bytes()), ", reserved ",
      HumanBytes(status.memory_reserved_bytes()), ", idle ", HumanBytes(status.idle_bytes()),
      ")\n"));
  Print(absl::StrCat("disk    ", HumanBytes(status.disk_free_bytes()), " free in ",
                     status.data_dir(), "\n"));
  if (const v1::StepTimes& times = status.last_step(); times.step() > 0)
    Print(absl::StrCat("step    ", times.step(), ": staged in ",
                       HumanSeconds(times.stage_seconds()), ", decided in ",
                       HumanSeconds(times.decide_seconds()), ", applied in ",
                       HumanSeconds(times.apply_seconds()), "\n"));
  Table table({{"TIER"},
               {"JOB"},
               {"SLOT"},
               {"BYTES", Align::kRight},
               {"PEAK", Align::kRight},
               {"RESERVED", Align::kRight},
               {"SHARE"}});
  std::map<std::string, uint64_t> in_tier;
  for (const v1::UseOfBytes& use : status.uses()) in_tier[use.tier()] += use.bytes();
  for (const v1::UseOfBytes& use : status.uses())
    table.AddRow({use.tier(), use.job().empty() ? "-" : use.job(), use.slot(),
                  HumanBytes(use.bytes()), HumanBytes(use.peak_bytes()),
                  HumanBytes(use.reserved_bytes()),
                  Bar(use.bytes(), in_tier[use.tier()], kShareWidth, context.terminal)});
  if (!table.empty()) Print(table.Render());
  for (const v1::UseOfBytes& use : status.uses())
    if (use.missing_bytes() > 0)
      Print(absl::StrCat(use.job(), ": the disk has ", HumanBytes(use.missing_bytes()),
                         " too little for its flushes: a checkpoint or clean stop may fail\n"));
}

// Returns what a person should know about a job besides its row; empty: nothing.
std::string Note(const v1::JobStatusResponse& job) {
  if (job.explanation().empty() && !job.has_rollback_step()) return "";
  std::string note = absl::StrCat(job.job(), ": ", job.explanation(), "\n");
  if (job.has_rollback_step())
    absl::StrAppend(&note, "`orlop rollback ", job.job(), " --to-step ", job.rollback_step(),
                    "` accepts the loss of later steps.\n");
  return note;
}

}  // namespace

int Servers(const Context& context) {
  const auto client = context.Connect();
  if (!client.ok()) return Fail(context, client.status());
  const auto servers = (*client)->ListServers();
  if (!servers.ok()) return Fail(context, servers.status());
  if (context.json) return PrintJson(ToJsonList(*servers)), kOk;
  Table table({{"NAME"},
               {"ADDRESS"},
               {"STATE"},
               {"ROLE"},
               {"FAILURE DOMAIN"},
               {"MEMORY"},
               {"USED", Align::kRight},
               {"BUDGET", Align::kRight}});
  for (const v1::ServerInfo& server : *servers) {
    std::vector<std::string> row = {server.name(), server.address(),
                                    server.ready() ? "ready" : server.state(),
                                    server.leader() ? "leader" : "", server.failure_domain()};
    if (const auto status =
            server.ready() ? (*client)->ServerStatus(server.name()) : absl::UnavailableError("");
        status.ok())
      row.insert(row.end(),
                 {Bar(status->memory_bytes(), status->memory_budget_bytes(), 10, context.terminal),
                  HumanBytes(status->memory_bytes()), HumanBytes(status->memory_budget_bytes())});
    table.AddRow(std::move(row));
  }
  Print(table.Render());
  return kOk;
}

int Status(const Context& context) {
  const auto client = context.Connect();
  if (!client.ok()) return Fail(context, client.status());
  const auto servers = (*client)->ListServers();
  if (!servers.ok()) return Fail(context, servers.status());
  std::vector<v1::ServerStatusResponse> all;
  int exit_code = kOk;
  std::string silent;
  for (const v1::ServerInfo& server : *servers) {
    if (server.silent_ms() > 0) {  // its last known state is worth more than the wait
      absl::StrAppend(&silent, server.name(), "  ", server.state(), "\n");
      continue;
    }
    auto status = (*client)->ServerStatus(server.name());
    if (status.ok())
      all.push_back(*std::move(status));
    else
      exit_code = Fail(context, status.status());
  }
  std::fputs(silent.c_str(), stderr);
  if (context.json) return PrintJson(ToJsonList(all)), exit_code;
  for (size_t i = 0; i < all.size(); ++i) {
    if (i > 0) Print("\n");
    PrintStatus(context, all[i]);
  }
  return exit_code;
}

int Jobs(const Context& context) {
  const auto client = context.Connect();
  if (!client.ok()) return Fail(context, client.status());
  const auto jobs = (*client)->ListJobs();
  if (!jobs.ok()) return Fail(context, jobs.status());
  if (context.json) return PrintJson(ToJsonList(*jobs)), kOk;
  if (jobs->empty()) return Print("no jobs yet: a worker's first step creates one\n"), kOk;
  Table table({{"JOB"},
               {"STATE"},
               {"STEP", Align::kRight},
               {"WORKERS", Align::kRight},
               {"TENSORS", Align::kRight},
               {"PARAMETERS", Align::kRight}});
  std::string notes;
  for (const v1::JobStatusResponse& job : *jobs) {
    table.AddRow({job.job(), StateName(job.state()),
                  job.committed_step() < 0 ? "-" : absl::StrCat(job.committed_step()),
                  absl::StrCat(job.world_size()), absl::StrCat(job.tensor_count()),
                  HumanCount(job.parameter_count())});
    absl::StrAppend(&notes, Note(job));
  }
  Print(table.Render() + notes);
  return kOk;
}

}  // namespace orlop::cli
