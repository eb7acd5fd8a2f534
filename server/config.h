// Configuration of orlopd: one struct, filled from a TOML file and then from flags, validated once.
//
//   [server]   listen, name, peers, failure_domain, log_level, threads, cpus, numa_node
//   [storage]  data_dir, memory
//   [tls]      cert, key, ca
//
// Every key is a flag of the same meaning (`data_dir` is --data-dir, `cert` is --tls-cert); a flag
// wins over the file. An unknown section or key, a value out of range, an empty file or one that
// does not parse is refused, naming file, line, key, value and limit: a torn file never starts a
// server with half of its settings.
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
  std::string name;  // this server's entry in `peers`; found by `listen` where unambiguous
  std::vector<PeerAddress>
      peers;  // sorted by name; never empty after validation, alone: this server only
  std::string failure_domain;                 // host or rack label; empty: not given
  std::string log_level = "info";             // trace, debug, info, warning, error
  std::string data_dir = "orlop-data";        // created when missing; one server at a time
  uint64_t memory_bytes = uint64_t{4} << 30;  // hard budget of all large memory; at least 64 MiB
  ThreadPlacement workers;                    // threads that stage, apply and flush shards
  std::string tls_cert, tls_key, tls_ca;      // PEM files; all three or none
  std::string ready_file;  // written with the address once the server can serve; empty: none
  pid_t parent_pid = 0;    // stop gracefully when this process ends; 0: never

  bool tls() const { return !tls_cert.empty(); }
  const PeerAddress& self() const;  // the entry of `peers` called `name`
};

// A number of bytes as Kubernetes writes it: digits, optionally with a fraction, and Ki, Mi, Gi,
// Ti, k, M, G or T, optionally followed by B ("4GiB", "1.5G", "1048576"). InvalidArgument on
// anything else, or above 2^60.
absl::StatusOr<uint64_t> ParseBytes(absl::string_view text);

// "a=host:1,b=host:2" or "host:1,host:2" (name = address), sorted by name. InvalidArgument on a
// repeated name or bad address.
absl::StatusOr<std::vector<PeerAddress>> ParsePeers(absl::string_view text);

// Sets what the TOML text says in `options`. `file` is for messages only.
absl::Status ApplyToml(absl::string_view text, const std::string& file, Options* options);

// Completes (name, peers) and checks the whole. Call once, after file and flags.
//   InvalidArgument     a value outside its limit, or settings that contradict one another
//   FailedPrecondition  plaintext on an address that is neither loopback nor a Unix socket
absl::Status Validate(Options* options);

// Options from the command line and the file it names with --config. `*exit_code` is set (and the
// options are to be ignored) when the command line asked for help or the version, or was wrong and
// has been explained on stderr.
absl::StatusOr<Options> ParseCommandLine(int argc, char** argv, int* exit_code);

// Whether an address is a Unix socket or names this host only (127.0.0.0/8, ::1, localhost).
bool IsLocalAddress(absl::string_view address);

}  // namespace orlop::server
