// bench wire: GB/s and CPU seconds per GB of pushes and pulls to two servers, hash and norm
// included, beside the same bytes through bare gRPC streams and through plain sockets. The three
// run one after another in every round, in a rotating order.
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "bench/bench.h"
#include "bench/job.h"
#include "bench/peer.h"
#include "bench/processes.h"

namespace orlop::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kServers = 2;
constexpr int kMebibytes = 128;

// The measurements of one path in every round.
struct Path {
  std::string name;
  std::function<absl::Status()> move;
  std::function<double()> cpu_seconds;  // of the other processes
  std::vector<double> gigabytes_per_second, cpu_seconds_per_gigabyte;
};

absl::Status Measure(Path* path, uint64_t bytes, bool record) {
  const double gigabytes = static_cast<double>(bytes) / 1e9,
               cpu = path->cpu_seconds() + OwnCpuSeconds();
  const Clock::time_point start = Clock::now();
  if (absl::Status status = path->move(); !status.ok()) return status;
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  if (!record) return absl::OkStatus();
  path->gigabytes_per_second.push_back(gigabytes / seconds);
  path->cpu_seconds_per_gigabyte.push_back((path->cpu_seconds() + OwnCpuSeconds() - cpu) /
                                           gigabytes);
  return absl::OkStatus();
}

void AddFigures(const std::string& name, const std::array<Path, 3>& paths,
                std::vector<Figure>* figures) {
  for (size_t i = 1; i < paths.size(); ++i) {
    figures->push_back({name, "GB/s", "higher", paths[0].gigabytes_per_second, paths[i].name,
                        paths[i].gigabytes_per_second});
    figures->push_back({name + ".cpu", "s/GB", "lower", paths[0].cpu_seconds_per_gigabyte,
                        paths[i].name, paths[i].cpu_seconds_per_gigabyte});
  }
}

}  // namespace

absl::StatusOr<std::vector<Figure>> BenchWire(const Options& options) {
  auto peers = BarePeers::Start(kServers);  // before gRPC starts a thread here
  if (!peers.ok()) return peers.status();
  auto job = BenchJob::Create(kServers,
                              static_cast<uint64_t>(options.mebibytes.value_or(kMebibytes)) << 20,
                              "4GiB", options.data_dir);
  if (!job.ok()) return job.status();
  const auto job_cpu = [&] { return (*job)->ServersCpuSeconds(); };
  const auto peers_cpu = [&] { return (*peers)->CpuSeconds(); };
  const auto bare = [&](Wire wire, Direction direction, absl::Span<char> bytes) {
    return [&peers, wire, direction, bytes] { return (*peers)->Move(wire, direction, bytes); };
  };
  std::array<Path, 3> push = {
      Path{"orlop", [&] { return (*job)->Push(); }, job_cpu},
      Path{"bare gRPC stream", bare(Wire::kGrpc, Direction::kPush, (*job)->pushed()), peers_cpu},
      Path{"raw socket", bare(Wire::kSocket, Direction::kPush, (*job)->pushed()), peers_cpu}};
  std::array<Path, 3> pull = {
      Path{"orlop", [&] { return (*job)->Pull(); }, job_cpu},
      Path{"bare gRPC stream", bare(Wire::kGrpc, Direction::kPull, (*job)->pulled()), peers_cpu},
      Path{"raw socket", bare(Wire::kSocket, Direction::kPull, (*job)->pulled()), peers_cpu}};
  // The first round warms caches, pages and windows.
  for (int round = -1; round < options.repetitions; ++round) {
    for (size_t i = 0; i < push.size(); ++i) {
      const size_t turn = (static_cast<size_t>(round + 1) + i) % push.size();
      if (absl::Status status = Measure(&push[turn], (*job)->bytes(), round >= 0); !status.ok())
        return status;
      if (absl::Status status = Measure(&pull[turn], (*job)->bytes(), round >= 0); !status.ok())
        return status;
    }
    // Aborting frees the staged gradients, so the next round's push stores its bytes again.
    if (auto attempt = (*job)->session()->Abort("next round of the bench"); !attempt.ok())
      return attempt.status();
  }
  std::vector<Figure> figures;
  AddFigures("wire.grpc.push", push, &figures);
  AddFigures("wire.grpc.pull", pull, &figures);
  return figures;
}

}  // namespace orlop::bench
