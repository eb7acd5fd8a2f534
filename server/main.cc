// The program orlopd: starts a state server, waits for SIGTERM, SIGINT or the end of --parent-pid,
// and stops the server gracefully.
//   Exit status  0: everything was flushed to disk, or help or the version was printed. 1: a
//                setting is invalid, the server could not start, or a job could not be flushed.
//                Another one (of CLI11): the command line could not be parsed.
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <iostream>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/config.h"
#include "server/memory/process_memory.h"
#include "server/orlop_server.h"
#include "spdlog/sinks/stdout_color_sinks.h"
#include "spdlog/spdlog.h"

namespace {

using orlop::server::Options;
using orlop::server::OrlopServer;

void StartLog(const std::string& level) {
  auto logger = spdlog::stderr_color_mt("orlopd");
  logger->set_pattern("%Y-%m-%d %H:%M:%S.%e %^%l%$ %v");
  logger->set_level(spdlog::level::from_str(level));
  spdlog::set_default_logger(logger);
}

constexpr int kReadyPollMs = 20;

// Waits for a signal or for the end of the parent, for at most `timeout_ms`; -1: without a limit.
// Returns whether one of them happened. `parent_fd` is a pidfd (-1: none), because it reports the
// end of the process. PR_SET_PDEATHSIG would report the end of the thread that started this
// process.
bool IsEnd(int signal_fd, int parent_fd, int timeout_ms) {
  pollfd fds[] = {{signal_fd, POLLIN, 0}, {parent_fd, POLLIN, 0}};
  return poll(fds, parent_fd >= 0 ? 2 : 1, timeout_ms) > 0;
}

// Prints the address on stdout and writes it to --ready-file.
absl::Status TellReady(const Options& options, const std::string& address) {
  std::cout << "ready " << address << "\n" << std::flush;
  if (options.ready_file.empty()) return absl::OkStatus();
  const std::string partial = options.ready_file + ".partial";
  std::ofstream(partial) << address << "\n";
  if (rename(partial.c_str(), options.ready_file.c_str()) == 0) return absl::OkStatus();
  return absl::InvalidArgumentError("--ready-file " + options.ready_file + " cannot be written");
}

int Fail(const absl::Status& status) {
  std::cerr << "orlopd: " << std::string(status.message()) << "\n";
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  int exit_code = -1;
  absl::StatusOr<Options> options = orlop::server::ParseCommandLine(argc, argv, &exit_code);
  if (exit_code >= 0) return exit_code;
  if (!options.ok()) return Fail(options.status());
  StartLog(options->log_level);
  orlop::server::BoundHeap();

  sigset_t ends;
  sigemptyset(&ends);
  sigaddset(&ends, SIGTERM);
  sigaddset(&ends, SIGINT);
  pthread_sigmask(SIG_BLOCK, &ends, nullptr);  // threads started later inherit the mask
  const int signal_fd = signalfd(-1, &ends, SFD_CLOEXEC);
  int parent_fd = -1;
  if (options->parent_pid > 0) {
    parent_fd = static_cast<int>(syscall(SYS_pidfd_open, options->parent_pid, 0));
    if (parent_fd < 0)
      return Fail(absl::FailedPreconditionError("--parent-pid: there is no such process"));
  }

  absl::StatusOr<std::unique_ptr<OrlopServer>> server = OrlopServer::Start(*options);
  if (!server.ok()) return Fail(server.status());
  bool is_end = false;
  while (!is_end && !(*server)->ready()) is_end = IsEnd(signal_fd, parent_fd, kReadyPollMs);
  if (!is_end) {
    if (absl::Status told = TellReady(*options, (*server)->address()); !told.ok())
      return Fail(told);
  }
  while (!is_end) is_end = IsEnd(signal_fd, parent_fd, -1);
  const absl::Status stopped = (*server)->Stop();
  if (!stopped.ok()) return Fail(stopped);
  spdlog::info("stopped; everything is on disk");
  return 0;
}
