#include "server/process_log.h"

#include <fcntl.h>
#include <google/protobuf/stubs/logging.h>
#include <grpc/support/log.h>
#include <signal.h>
#include <sys/types.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>

#include "absl/strings/str_cat.h"
#include "spdlog/common.h"
#include "spdlog/details/log_msg.h"
#include "spdlog/logger.h"
#include "spdlog/sinks/base_sink.h"
#include "spdlog/spdlog.h"

namespace orlop::server {
namespace {

// Writes each line with one call that does not wait, and drops it if that fails.
class LossySink : public spdlog::sinks::base_sink<std::mutex> {
 public:
  // A second opening of what standard error is has flags of its own, so that other processes with
  // the same pipe or terminal go on waiting. A socket cannot be opened again.
  LossySink() : fd_(open("/proc/self/fd/2", O_WRONLY | O_APPEND | O_NONBLOCK | O_CLOEXEC)) {
    if (fd_ < 0) fd_ = STDERR_FILENO;
  }

 protected:
  void sink_it_(const spdlog::details::log_msg& message) override {
    spdlog::memory_buf_t line;
    formatter_->format(message, line);
    if (dropped_ > 0 && Write(absl::StrCat(dropped_, " lines of the log could not be written\n")))
      dropped_ = 0;
    if (dropped_ > 0 || !Write({line.data(), line.size()})) ++dropped_;
  }
  void flush_() override {}

 private:
  bool Write(const std::string& text) {
    return write(fd_, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  }

  int fd_;
  uint64_t dropped_ = 0;
};

void LogForGrpc(gpr_log_func_args* args) {
  if (args->severity == GPR_LOG_SEVERITY_ERROR)
    spdlog::warn("gRPC: {} ({}:{})", args->message, args->file, args->line);
}

// Async-signal-safe.
void OnCrash(int signal) {
  const char head[] = "orlopd: crashed by signal ";
  const char tail[] = "; what was not on disk is lost\n";
  const char digits[] = {static_cast<char>('0' + signal / 10),
                         static_cast<char>('0' + signal % 10)};
  ssize_t unused = write(STDERR_FILENO, head, sizeof(head) - 1);
  unused = write(STDERR_FILENO, digits, sizeof(digits));
  unused = write(STDERR_FILENO, tail, sizeof(tail) - 1);
  (void)unused;
  raise(signal);  // the default action, which SA_RESETHAND has put back
}

}  // namespace

void StartLog(const std::string& level) {
  ::signal(SIGPIPE, SIG_IGN);
  ::signal(SIGXFSZ, SIG_IGN);
  auto logger = std::make_shared<spdlog::logger>("orlopd", std::make_shared<LossySink>());
  logger->set_pattern("%Y-%m-%d %H:%M:%S.%e %l %v");
  logger->set_level(spdlog::level::from_str(level));
  spdlog::set_default_logger(logger);
  gpr_set_log_function(LogForGrpc);
  // It would write a line for each name of a request that is no UTF-8. The caller gets an error.
  google::protobuf::SetLogHandler(nullptr);
}

void ReportCrashes() {
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGSYS}) {
    struct sigaction before = {};
    sigaction(signal, nullptr, &before);
    if (before.sa_handler != SIG_DFL) continue;  // a sanitizer has its own
    struct sigaction action = {};
    action.sa_handler = OnCrash;
    action.sa_flags = static_cast<int>(SA_RESETHAND | SA_NODEFER);
    sigaction(signal, &action, nullptr);
  }
}

}  // namespace orlop::server
