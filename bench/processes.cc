#include "bench/processes.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace orlop::bench {
namespace {

constexpr std::chrono::seconds kStartTimeout{30};
constexpr std::chrono::milliseconds kPoll{20};

double Seconds(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

absl::Status SystemError(std::string_view what) {
  const int error = errno;
  return absl::Status(absl::ErrnoToStatusCode(error),
                      absl::StrCat(std::string(what), ": ", std::strerror(error)));
}

// Returns a port that was free a moment ago. Servers must know each other's addresses before they
// start.
absl::StatusOr<int> FreePort() {
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  const bool bound = bind(listener, reinterpret_cast<sockaddr*>(&address), size) == 0 &&
                     getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) == 0;
  absl::Status status = bound ? absl::OkStatus() : SystemError("no free port");
  close(listener);
  if (!status.ok()) return status;
  return ntohs(address.sin_port);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Child>> Child::Start(const std::vector<std::string>& arguments,
                                                    bool read_output) {
  int input[2] = {-1, -1}, output[2] = {-1, -1};
  if (pipe2(input, O_CLOEXEC) != 0 || pipe2(output, O_CLOEXEC) != 0) return SystemError("pipe");
  std::vector<char*> argv;
  argv.reserve(arguments.size() + 1);
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  const pid_t parent = getpid(), pid = fork();
  // After fork in a process with threads only async-signal-safe calls are allowed.
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) _exit(1);
    dup2(input[0], STDIN_FILENO);
    dup2(read_output ? output[1] : STDERR_FILENO, STDOUT_FILENO);
    execv(argv[0], argv.data());
    _exit(127);
  }
  absl::Status status = pid < 0 ? SystemError("fork") : absl::OkStatus();
  close(input[0]);
  close(output[1]);
  if (!status.ok()) {
    close(input[1]);
    close(output[0]);
    return status;
  }
  return std::unique_ptr<Child>(new Child(pid, input[1], output[0]));
}

Child::~Child() {
  close(input_);
  close(output_);
  if (!Running()) return;
  kill(pid_, SIGTERM);
  waitpid(pid_, nullptr, 0);
}

bool Child::Running() {
  if (!reaped_) reaped_ = waitpid(pid_, nullptr, WNOHANG) == pid_;
  return !reaped_;
}

double Child::CpuSeconds() const {
  clockid_t clock;
  return clock_getcpuclockid(pid_, &clock) == 0 ? Seconds(clock) : 0;
}

std::string Child::ReadLine() {
  std::string line;
  for (char c; read(output_, &c, 1) == 1 && c != '\n';) line += c;
  return line;
}

double OwnCpuSeconds() { return Seconds(CLOCK_PROCESS_CPUTIME_ID); }

std::string SiblingProgram(const std::string& name) {
  return std::filesystem::read_symlink("/proc/self/exe").parent_path() / name;
}

absl::StatusOr<std::unique_ptr<PrivateServers>> PrivateServers::Start(int count,
                                                                      const std::string& memory,
                                                                      const std::string& data_dir) {
  std::unique_ptr<PrivateServers> servers(new PrivateServers());
  const std::filesystem::path parent =
      data_dir.empty() ? std::filesystem::temp_directory_path() : std::filesystem::path(data_dir);
  std::string pattern = parent / "orlop-bench-XXXXXX";
  if (mkdtemp(pattern.data()) == nullptr) return SystemError(pattern);
  servers->directory_ = pattern;
  std::string peers;
  for (int i = 0; i < count; ++i) {
    const absl::StatusOr<int> port = FreePort(), peer_port = FreePort();
    for (const absl::Status& status : {port.status(), peer_port.status()})
      if (!status.ok()) return status;
    servers->addresses_.push_back(absl::StrCat("127.0.0.1:", *port));
    absl::StrAppend(&peers, i > 0 ? "," : "", servers->addresses_[i], "@127.0.0.1:", *peer_port);
  }
  for (int i = 0; i < count; ++i) {
    const std::string home = absl::StrCat(servers->directory_, "/", i);
    auto child = Child::Start({SiblingProgram("orlopd"), "--listen", servers->addresses_[i],
                               "--peers", peers, "--data-dir", home, "--memory", memory,
                               "--log-level", "error", "--ready-file", home + ".ready"},
                              false);
    if (!child.ok()) return child.status();
    servers->children_.push_back(*std::move(child));
  }
  const auto deadline = std::chrono::steady_clock::now() + kStartTimeout;
  for (int i = 0; i < count; ++i)
    while (!std::filesystem::exists(absl::StrCat(servers->directory_, "/", i, ".ready"))) {
      if (!servers->children_[i]->Running())
        return absl::UnavailableError("orlopd ended at its start");
      if (std::chrono::steady_clock::now() > deadline)
        return absl::DeadlineExceededError("orlopd was not ready within 30 s");
      std::this_thread::sleep_for(kPoll);
    }
  return servers;
}

PrivateServers::~PrivateServers() {
  children_.clear();
  std::error_code ignored;  // leftovers stay in the temporary directory
  std::filesystem::remove_all(directory_, ignored);
}

double PrivateServers::CpuSeconds() const {
  double seconds = 0;
  for (const auto& child : children_) seconds += child->CpuSeconds();
  return seconds;
}

}  // namespace orlop::bench
