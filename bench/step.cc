// `orlop bench step` measures the seconds of push, commit and pull of a job with 2^26 parameters on
// two servers. In the same rounds it moves the same number of bytes over bare gRPC streams, which
// are the baseline. `step.apply.share` is the time that the slowest server took from the commit to
// its last applied shard. A pull waits for the apply, so their times overlap.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "bench/bench.h"
#include "bench/job.h"
#include "bench/peer.h"
#include "client/client.h"
#include "orlop/v1/types.pb.h"

namespace orlop::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kServers = 2;
constexpr uint64_t kBytes = uint64_t{2} << 26;  // of the weights: 2^26 parameters of bf16

// Runs `call` and returns the seconds it took.
template <typename Call>
absl::StatusOr<double> Timed(Call call) {
  const Clock::time_point start = Clock::now();
  if (absl::Status status = call(); !status.ok()) return status;
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Returns the seconds from commit to last applied shard of the last step, on the slowest server.
absl::StatusOr<double> SlowestApply(client::Client* client) {
  const auto servers = client->ListServers();
  if (!servers.ok()) return servers.status();
  double slowest = 0;
  for (const v1::ServerInfo& server : *servers) {
    const auto status = client->ServerStatus(server.name());
    if (!status.ok()) return status.status();
    slowest = std::max(slowest, status->last_step().apply_seconds());
  }
  return slowest;
}

}  // namespace

absl::StatusOr<std::vector<Figure>> BenchStep(const Options& options) {
  auto peers = BarePeers::Start(kServers);
  if (!peers.ok()) return peers.status();
  auto job = BenchJob::Create(kServers, kBytes, "4GiB", options.data_dir);
  if (!job.ok()) return job.status();
  std::vector<double> push, commit, pull, apply, total, bare_push, bare_pull, bare_total;
  // Round -1 warms up: its times are not kept.
  for (int round = -1; round < options.repetitions; ++round) {
    // The elements of a braced list are evaluated in order, so the calls happen in this order.
    const absl::StatusOr<double> times[] = {
        Timed([&] { return (*job)->Push(); }),
        Timed([&] { return (*job)->Commit(); }),
        Timed([&] { return (*job)->Pull(); }),
        SlowestApply((*job)->client()),
        Timed([&] { return (*peers)->Move(Wire::kGrpc, Direction::kPush, (*job)->pushed()); }),
        Timed([&] { return (*peers)->Move(Wire::kGrpc, Direction::kPull, (*job)->pulled()); })};
    for (const auto& time : times)
      if (!time.ok()) return time.status();
    if (round < 0) continue;
    push.push_back(*times[0]);
    commit.push_back(*times[1]);
    pull.push_back(*times[2]);
    apply.push_back(*times[3]);
    total.push_back(*times[0] + *times[1] + *times[2]);
    bare_push.push_back(*times[4]);
    bare_pull.push_back(*times[5]);
    bare_total.push_back(*times[4] + *times[5]);
  }
  const std::string both = "bare gRPC push and pull";
  std::vector<Figure> figures = {{"step.total", "s", "lower", total, both, bare_total},
                                 {"step.push", "s", "lower", push, "bare gRPC push", bare_push},
                                 {"step.pull", "s", "lower", pull, "bare gRPC pull", bare_pull}};
  // The baseline of a share is the whole step, so its ratio is the fraction of the step.
  const std::pair<const char*, const std::vector<double>*> parts[] = {
      {"step.push.share", &push},
      {"step.commit.share", &commit},
      {"step.pull.share", &pull},
      {"step.apply.share", &apply}};
  for (const auto& [name, seconds] : parts)
    figures.push_back({name, "s", "lower", *seconds, "step.total", total});
  return figures;
}

}  // namespace orlop::bench
