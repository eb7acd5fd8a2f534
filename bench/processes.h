// This header starts processes for a benchmark: any program (Child) and a cluster of state servers
// (PrivateServers). It measures the CPU time that they use.
//   Threads  a Child or PrivateServers object belongs to one thread
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace orlop::bench {

// A Child is a child process. The destructor sends it SIGTERM and waits until it has ended. It also
// receives SIGTERM if the thread that called Start ends, so call Start on the main thread.
class Child {
 public:
  // Starts the program at path `arguments[0]`; PATH is not searched. The child's standard input is
  // a pipe that nobody writes to and that the destructor closes. Its standard output can be read by
  // ReadLine if `read_output`, and goes to the standard error of this process otherwise.
  //   Status  the errno of pipe or fork. If the program cannot be executed, Start returns OK and
  //           the child exits with 127.
  static absl::StatusOr<std::unique_ptr<Child>> Start(const std::vector<std::string>& arguments,
                                                      bool read_output);
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  // Returns the user and system time that the child has used so far, in seconds; 0 once Running has
  // returned false.
  double CpuSeconds() const;
  // Returns whether the child has not ended yet. Does not wait.
  bool Running();
  // Waits for the next line of the child's standard output and returns it without the newline.
  // Returns an empty string at the end of the output, and if Start had no `read_output`.
  std::string ReadLine();

 private:
  Child(pid_t pid, int input, int output) : pid_(pid), input_(input), output_(output) {}
  pid_t pid_;
  int input_, output_;  // this process's ends of the two pipes
  bool reaped_ = false;
};

// Returns the user and system time that this process has used so far, in seconds.
double OwnCpuSeconds();
// Returns the path of the program `name` in the directory of the running program.
std::string SiblingProgram(const std::string& name);

// A PrivateServers is one cluster of orlopd processes on loopback TCP. Their data is in a directory
// of its own. The destructor stops the servers and removes the directory.
class PrivateServers {
 public:
  // Starts `count` servers, at least 1, and waits at most 30 s until all of them are ready.
  // `memory` is the value of --memory of each server, for example "4GiB". `data_dir` is an existing
  // directory, which gets the directory of the cluster; empty: that for temporary files.
  //   Status  Unavailable (a server ended), DeadlineExceeded, or as Child::Start
  static absl::StatusOr<std::unique_ptr<PrivateServers>> Start(int count, const std::string& memory,
                                                               const std::string& data_dir);
  ~PrivateServers();

  // Returns the address of the first server (host:port), from which a client learns the others.
  const std::string& address() const { return addresses_[0]; }
  // Returns the directory that has the data directory of each server.
  const std::string& directory() const { return directory_; }
  // Returns the sum of Child::CpuSeconds over the servers.
  double CpuSeconds() const;

 private:
  PrivateServers() = default;
  std::string directory_;
  std::vector<std::string> addresses_;
  std::vector<std::unique_ptr<Child>> children_;
};

}  // namespace orlop::bench
