// The configuration of orlopd: a struct that is filled from a TOML file, then from flags, and then
// validated.
//
//   [server]   listen, peer_listen, name, peers, failure_domain, log_level, threads, cpus,
//              numa_node
//   [storage]  data_dir, memory, flush_every, rollback
//   [tls]      cert, key, ca, roles
//
// Every key has a flag with the same meaning (`data_dir` has --data-dir, `cert` has --tls-cert). A
// flag overrides the file. An unknown section or key, a value out of range, and a file that is
// empty or does not parse are errors, which name file, line, key, value and limit. So a server does
// not start with half of its settings because its file was cut off.
//   Threads  The functions are safe from any thread.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/thread_pool.h"
#include "server/cluster/peer_links.h"

namespace orlop::server {

struct Options {
  std::string listen = "127.0.0.1:7070";  // host:port (port 0: the system chooses) or unix:/path
  // Where the other servers of the cluster reach this one; workers and `orlop` use `listen`. If it
  // is empty, Validate sets it in a cluster, as DefaultPeerAddress says. Empty after that: this
  // server is alone, and no door for peers is opened.
  std::string peer_listen;
  // The name of this server's entry in `peers`. If it is empty, Validate takes the entry with the
  // address `listen`, or the only entry.
  std::string name;
  // All servers of the cluster, sorted by name. If it is empty, Validate enters this server.
  std::vector<PeerAddress> peers;
  std::string failure_domain;                 // label of the host or rack; empty: not given
  std::string log_level = "info";             // trace, debug, info, warning, error
  std::string data_dir = "orlop-data";        // created if missing; used by one process at a time
  uint64_t memory_bytes = uint64_t{4} << 30;  // hard limit of all large memory; at least 64 MiB
  // A running job is written to disk this often; 0: only on a clean stop.
  int64_t flush_every_ms = 600'000;
  // After memory was lost: false: a person accepts the rollback. True: the server does.
  bool accepts_rollback = false;
  ThreadPlacement workers;                // of the threads that stage, apply and flush shards
  std::string tls_cert, tls_key, tls_ca;  // PEM files; all three, or none: no TLS
  std::string roles;  // with TLS: the file that server/services/roles.h describes
  // The program orlopd writes the address to this file once the server is ready; empty: no file.
  std::string ready_file;
  // The program orlopd stops gracefully when this process ends; 0: no process is watched.
  pid_t parent_pid = 0;

  bool tls() const { return !tls_cert.empty(); }
  // Returns the entry of `peers` that has `name`. The options must have passed Validate.
  const PeerAddress& self() const;
};

// Parses a number of bytes, written as in Kubernetes: digits, optionally with a fraction, then
// optionally Ki, Mi, Gi, Ti, k, M, G or T, then optionally B ("4GiB", "1.5G", "1048576"). A
// fraction of a byte is cut off.
//   Status  InvalidArgument: the text has another form, or the number is above 2^60.
absl::StatusOr<uint64_t> ParseBytes(absl::string_view text);

// Parses a time, written as a whole number and ms, s, min or h ("90s", "10min"), to ms. "never" is
// 0.
//   Status  InvalidArgument: the text has another form, or the time is zero or above a year.
absl::StatusOr<int64_t> ParseDuration(absl::string_view text);

// Returns the address of a server's door for its peers where none is given: the port after that of
// its door for workers, or unix:/path.peer.
std::string DefaultPeerAddress(absl::string_view address);

// Parses "a=host:1,b=host:2", or "host:1,host:2", where each address is also the name. An address
// may be followed by that of the door for peers, as in "a=host:1@host:9". The result is sorted by
// name.
//   Status  InvalidArgument: a name is repeated or too long, an address is malformed, or there are
//           more than kMaxServers.
absl::StatusOr<std::vector<PeerAddress>> ParsePeers(absl::string_view text);

// Sets the members of `options` that the TOML text has keys for. Messages name `file`.
//   Status  InvalidArgument; `options` may then be half set.
absl::Status ApplyToml(absl::string_view text, const std::string& file, Options* options);

// Checks the options and completes them: sets `name` and `peers` if they are empty, and resolves
// workers.numa_node to workers.cpus. Call it once, after the file and the flags.
//   Status  InvalidArgument: a value is out of range, or settings contradict one another.
//           FailedPrecondition: there is no TLS, but an address is neither loopback nor a Unix
//           socket.
absl::Status Validate(Options* options);

// Returns the validated options of the command line and of the file that it names with --config. If
// the command line asks for help or the version, or cannot be parsed, the answer was printed. Then
// `*exit_code` is set, and the returned options have no meaning.
//   Status  InvalidArgument and FailedPrecondition of ApplyToml and Validate, naming the flag.
absl::StatusOr<Options> ParseCommandLine(int argc, char** argv, int* exit_code);

// Returns whether an address is a Unix socket or loopback (127.0.0.0/8, [::1], localhost).
bool IsLocalAddress(absl::string_view address);

}  // namespace orlop::server
