// The child processes of a bench, their CPU time, and private state servers.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace orlop::bench {

// A child process. It gets SIGTERM when this process dies, and from the destructor, which waits for
// it.
class Child {
 public:
  // `arguments[0]` is the program's path. Its standard input stays open until the destructor. If
  // `read_output`, ReadLine reads its standard output.
  static absl::StatusOr<std::unique_ptr<Child>> Start(const std::vector<std::string>& arguments,
                                                      bool read_output);
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  // Returns its user and system time so far.
  double CpuSeconds() const;
  bool Running();
  // Returns the next line of its standard output, without the end of line; empty at the end.
  std::string ReadLine();

 private:
  Child(pid_t pid, int input, int output) : pid_(pid), input_(input), output_(output) {}
  pid_t pid_;
  int input_, output_;  // -1: inherited
  bool reaped_ = false;
};

// Returns the CPU time of this process so far.
double OwnCpuSeconds();
// Returns the path of a program in the directory of this one.
std::string SiblingProgram(const std::string& name);

// `count` orlopd processes on loopback TCP. Their data is in a temporary directory, removed by the
// destructor.
class PrivateServers {
 public:
  static absl::StatusOr<std::unique_ptr<PrivateServers>> Start(int count,
                                                               const std::string& memory);
  ~PrivateServers();

  const std::string& address() const { return addresses_[0]; }
  double CpuSeconds() const;

 private:
  PrivateServers() = default;
  std::string directory_;
  std::vector<std::string> addresses_;
  std::vector<std::unique_ptr<Child>> children_;
};

}  // namespace orlop::bench
