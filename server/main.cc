// The program orlopd: starts a state server, waits for a signal or the end of --parent-pid, and
// stops the server gracefully.
//   Signals      Every signal that would end the process and can be caught stops it gracefully, but
//                for those of a crash. SIGPIPE and SIGXFSZ are ignored.
//   Exit status  0: everything was flushed to disk, or help or the version was printed. 1: a
//                setting is invalid, the server could not start, or a job could not be flushed.
//                Another one (of CLI11): the command line could not be parsed.
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <future>
#include <iostream>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/config.h"
#include "server/memory/process_memory.h"
#include "server/orlop_server.h"
#include "server/process_log.h"
#include "spdlog/spdlog.h"

namespace {

using orlop::server::Options;
using orlop::server::OrlopServer;

constexpr int kReadyPollMs = 20;

// What a scheduler, a terminal, a limit or an operator may send.
constexpr int kEnds[] = {SIGTERM, SIGINT,  SIGHUP,    SIGQUIT, SIGUSR1, SIGUSR2,
                         SIGXCPU, SIGALRM, SIGVTALRM, SIGPROF, SIGIO,   SIGPWR};

// Waits for a signal or for the end of the parent, for at most `timeout_ms`; -1: without a limit.
// Returns whether one of them happened, and logs which. `parent_fd` is a pidfd (-1: none), because
// it reports the end of the process. PR_SET_PDEATHSIG would report the end of the thread that
// started this process.
bool IsEnd(int signal_fd, int parent_fd, int timeout_ms) {
  pollfd fds[] = {{signal_fd, POLLIN, 0}, {parent_fd, POLLIN, 0}};
  if (poll(fds, parent_fd >= 0 ? 2 : 1, timeout_ms) <= 0) return false;
  signalfd_siginfo signal = {};
  if (fds[0].revents == 0) {
    spdlog::info("process --parent-pid has ended");
  } else if (read(signal_fd, &signal, sizeof(signal)) == sizeof(signal)) {
    spdlog::info("SIG{} from process {}", sigabbrev_np(static_cast<int>(signal.ssi_signo)),
                 signal.ssi_pid);
  }
  return true;
}

// Ends the process without the destructors of static objects, which threads of gRPC may still use.
[[noreturn]] void End(int code) {
  std::cout << std::flush;
  std::cerr << std::flush;
  _exit(code);
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
  umask(S_IRWXG | S_IRWXO);  // directories 0700, files and sockets 0600 and 0700
  orlop::server::StartLog(options->log_level);
  orlop::server::ReportCrashes();
  orlop::server::BoundHeap();

  sigset_t ends;
  sigemptyset(&ends);
  for (const int end : kEnds) sigaddset(&ends, end);
  pthread_sigmask(SIG_BLOCK, &ends, nullptr);  // threads started later inherit the mask
  const int signal_fd = signalfd(-1, &ends, SFD_CLOEXEC);
  int parent_fd = -1;
  if (options->parent_pid > 0) {
    parent_fd = static_cast<int>(syscall(SYS_pidfd_open, options->parent_pid, 0));
    if (parent_fd < 0)
      return Fail(absl::FailedPreconditionError("--parent-pid: there is no such process"));
  }

  std::atomic<bool> is_ending = false;
  auto starting =
      std::async(std::launch::async, [&] { return OrlopServer::Start(*options, &is_ending); });
  bool is_end = false;
  while (!is_end && starting.wait_for(std::chrono::seconds(0)) != std::future_status::ready)
    is_end = IsEnd(signal_fd, parent_fd, kReadyPollMs);
  is_ending = is_end;
  absl::StatusOr<std::unique_ptr<OrlopServer>> server = starting.get();
  if (absl::IsCancelled(server.status())) {
    spdlog::info("stopped before it had started; what was on disk stays");
    End(0);
  }
  if (!server.ok()) End(Fail(server.status()));
  while (!is_end && !(*server)->ready()) is_end = IsEnd(signal_fd, parent_fd, kReadyPollMs);
  if (!is_end) {
    if (absl::Status told = TellReady(*options, (*server)->address()); !told.ok())
      return Fail(told);
  }
  while (!is_end) is_end = IsEnd(signal_fd, parent_fd, -1);
  const absl::Status stopped = (*server)->Stop();
  server->reset();
  if (!stopped.ok()) End(Fail(stopped));
  spdlog::info("stopped; everything is on disk");
  End(0);
}
