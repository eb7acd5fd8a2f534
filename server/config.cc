#include "server/config.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/thread_pool.h"
#include "proto/limits.h"
#include "server/cluster/peer_links.h"
#include "server/services/roles.h"

#define TOML_HEADER_ONLY 0
#include "toml++/toml.h"

namespace orlop::server {
namespace {

constexpr int kMaxWorkerThreads = 1024;

constexpr uint64_t kMinMemoryBytes = uint64_t{64} << 20;
constexpr uint64_t kMaxMemoryBytes = uint64_t{1} << 60;

using Setter = std::function<absl::Status(const std::string& value, Options* options)>;

// A flag, and the key of the TOML file that has the same meaning. If `section` is empty, there is
// no such key.
struct Setting {
  const char* flag;
  const char* section;
  const char* key;
  const char* help;
  Setter set;
};

Setter Text(std::string Options::*member) {
  return [member](const std::string& value, Options* options) {
    options->*member = value;
    return absl::OkStatus();
  };
}

absl::Status SetMemory(const std::string& value, Options* options) {
  absl::StatusOr<uint64_t> bytes = ParseBytes(value);
  if (!bytes.ok()) return bytes.status();
  options->memory_bytes = *bytes;
  return absl::OkStatus();
}

absl::Status SetFlushEvery(const std::string& value, Options* options) {
  absl::StatusOr<int64_t> every = ParseDuration(value);
  if (every.ok()) options->flush_every_ms = *every;
  return every.status();
}

absl::Status SetRollback(const std::string& value, Options* options) {
  options->accepts_rollback = value == "auto";
  if (value == "auto" || value == "ask") return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("'", value, "' is neither ask nor auto"));
}

absl::Status SetPeers(const std::string& value, Options* options) {
  absl::StatusOr<std::vector<PeerAddress>> peers = ParsePeers(value);
  if (!peers.ok()) return peers.status();
  options->peers = *std::move(peers);
  return absl::OkStatus();
}

// Parses a whole number from `least` to `most`.
absl::StatusOr<int> Whole(const std::string& value, int least, int most) {
  int number = 0;
  if (absl::SimpleAtoi(value, &number) && number >= least && number <= most) return number;
  return absl::InvalidArgumentError(
      absl::StrCat("'", value, "' is not a whole number from ", least, " to ", most));
}

absl::Status SetThreads(const std::string& value, Options* options) {
  absl::StatusOr<int> count = Whole(value, 1, kMaxWorkerThreads);
  if (count.ok()) options->workers.thread_count = *count;
  return count.status();
}

absl::Status SetCpus(const std::string& value, Options* options) {
  absl::StatusOr<std::vector<int>> cpus = ParseCpuList(value);
  if (!cpus.ok()) return cpus.status();
  options->workers.cpus = *std::move(cpus);
  return absl::OkStatus();
}

absl::Status SetNumaNode(const std::string& value, Options* options) {
  absl::StatusOr<int> node = Whole(value, 0, 1023);
  if (node.ok()) options->workers.numa_node = *node;
  return node.status();
}

absl::Status SetParent(const std::string& value, Options* options) {
  int pid = 0;
  if (!absl::SimpleAtoi(value, &pid) || pid <= 0) {
    return absl::InvalidArgumentError(absl::StrCat("'", value, "' is not a process id"));
  }
  options->parent_pid = pid;
  return absl::OkStatus();
}

const std::vector<Setting>& Settings() {
  static const auto* settings = new std::vector<Setting>{
      {"--listen", "server", "listen",
       "where to listen: HOST:PORT (port 0: any free one) or unix:/PATH", Text(&Options::listen)},
      {"--peer-listen", "server", "peer_listen",
       "where the other servers of the cluster reach this one: HOST:PORT or unix:/PATH; the port "
       "after that of --listen, or its path with .peer, unless told",
       Text(&Options::peer_listen)},
      {"--name", "server", "name", "this server's name in --peers, where --listen does not tell",
       Text(&Options::name)},
      {"--peers", "server", "peers",
       "all servers of the cluster: NAME=ADDRESS,... the same list on each; NAME=ADDRESS@PEER "
       "where "
       "a server's peers reach it elsewhere than --peer-listen is by default",
       SetPeers},
      {"--failure-domain", "server", "failure_domain", "host or rack label",
       Text(&Options::failure_domain)},
      {"--log-level", "server", "log_level", "trace, debug, info, warning or error",
       Text(&Options::log_level)},
      {"--threads", "server", "threads",
       "threads that stage, apply and flush shards; as many as processors unless told", SetThreads},
      {"--cpus", "server", "cpus", "processors of these threads, as 0-3,8; all unless told",
       SetCpus},
      {"--numa-node", "server", "numa_node", "keep these threads on the processors of this node",
       SetNumaNode},
      {"--data-dir", "storage", "data_dir",
       "directory of spilled state and flushes, one per server", Text(&Options::data_dir)},
      {"--memory", "storage", "memory", "budget of all large memory, as 4GiB", SetMemory},
      {"--flush-every", "storage", "flush_every",
       "how often a running job is written to disk, as 10min; never: on a clean stop only",
       SetFlushEvery},
      {"--rollback", "storage", "rollback",
       "who accepts to go back to the newest flush after memory was lost: ask (an operator) or "
       "auto",
       SetRollback},
      {"--tls-cert", "tls", "cert", "PEM certificate of this server", Text(&Options::tls_cert)},
      {"--tls-key", "tls", "key", "PEM private key of this server", Text(&Options::tls_key)},
      {"--tls-ca", "tls", "ca", "PEM certificates that sign every client and server",
       Text(&Options::tls_ca)},
      {"--roles", "tls", "roles",
       "file that says which certificates, or which users of this host, may do what; see "
       "SECURITY.md",
       Text(&Options::roles)},
      {"--ready-file", "", "", "file to write the address to once the server can serve",
       Text(&Options::ready_file)},
      {"--parent-pid", "", "", "stop when this process ends", SetParent},
  };
  return *settings;
}

const Setting* FindSetting(absl::string_view section, absl::string_view key) {
  for (const Setting& setting : Settings()) {
    if (section == setting.section && key == setting.key && !section.empty()) return &setting;
  }
  return nullptr;
}

std::string KnownKeys(absl::string_view section) {
  std::vector<std::string> keys;
  for (const Setting& setting : Settings()) {
    if (section == setting.section) keys.push_back(setting.key);
  }
  return absl::StrJoin(keys, ", ");
}

absl::Status Bad(const std::string& file, const toml::source_region& where,
                 const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(file, ":", where.begin.line, ": ", what));
}

// Returns the value of a key as the text that its flag would have. A list is joined by commas.
absl::StatusOr<std::string> TomlText(const toml::node& node) {
  if (auto text = node.value_exact<std::string>()) return *text;
  if (auto number = node.value_exact<int64_t>()) return absl::StrCat(*number);
  if (const toml::array* list = node.as_array()) {
    std::vector<std::string> items;
    for (const toml::node& item : *list) {
      auto text = item.value_exact<std::string>();
      if (!text) return absl::InvalidArgumentError("must be a list of strings");
      items.push_back(*text);
    }
    return absl::StrJoin(items, ",");
  }
  return absl::InvalidArgumentError("must be a string, a whole number or a list of strings");
}

absl::Status ApplySection(const std::string& section, const toml::table& table,
                          const std::string& file, Options* options) {
  for (auto&& [key, node] : table) {
    const std::string name(key.str());
    const std::string label = absl::StrCat("[", section, "] ", name);
    const Setting* setting = FindSetting(section, name);
    if (setting == nullptr) {
      return Bad(file, node.source(),
                 absl::StrCat(label, ": unknown key; known are ", KnownKeys(section)));
    }
    absl::StatusOr<std::string> text = TomlText(node);
    if (!text.ok())
      return Bad(file, node.source(), absl::StrCat(label, ": ", text.status().message()));
    absl::Status set = setting->set(*text, options);
    if (!set.ok()) return Bad(file, node.source(), absl::StrCat(label, ": ", set.message()));
  }
  return absl::OkStatus();
}

absl::Status CheckPort(absl::string_view address) {
  if (absl::StartsWith(address, "unix:")) {
    // sun_path holds 108 bytes with its terminating zero.
    if (address.size() - 5 > 107 || address.size() == 5) {
      return absl::InvalidArgumentError(absl::StrCat(
          "'", address, "': a Unix socket path has 1 to 107 bytes, this one ", address.size() - 5));
    }
    return absl::OkStatus();
  }
  const size_t colon = address.rfind(':');
  uint32_t port = 0;
  if (colon == absl::string_view::npos || colon == 0 ||
      !absl::SimpleAtoi(address.substr(colon + 1), &port) || port > 65535) {
    return absl::InvalidArgumentError(absl::StrCat(
        "'", address, "' is not an address: HOST:PORT with a port from 0 to 65535, or unix:/PATH"));
  }
  return absl::OkStatus();
}

// Sets `name` and `peers` if they are empty, and checks that `name` is in `peers`.
absl::Status FindSelf(Options* options) {
  if (options->peers.empty()) {
    if (options->name.empty()) options->name = "orlop-0";
    options->peers = {{options->name, options->listen, DefaultPeerAddress(options->listen)}};
    return absl::OkStatus();
  }
  if (options->name.empty()) {
    for (const PeerAddress& peer : options->peers) {
      if (peer.address == options->listen || options->peers.size() == 1) options->name = peer.name;
    }
  }
  for (const PeerAddress& peer : options->peers) {
    if (peer.name == options->name) return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      options->name.empty()
          ? absl::StrCat("--listen ", options->listen,
                         " is no address of --peers; say which entry is this server with --name")
          : absl::StrCat("--name ", options->name, " is not in --peers"));
}

absl::Status CheckTls(const Options& options) {
  const int given = !options.tls_cert.empty() + !options.tls_key.empty() + !options.tls_ca.empty();
  if (given != 0 && given != 3) {
    return absl::InvalidArgumentError(
        "--tls-cert, --tls-key and --tls-ca go together: give all three or none");
  }
  if (given == 3 && options.roles.empty()) {
    return absl::FailedPreconditionError(
        "with TLS nobody may do anything until --roles FILE says who; an entry [[grant]] name = "
        "\"*\" roles = [...] is for every certificate (SECURITY.md)");
  }
  if (given == 0 && !IsLocalAddress(options.listen)) {
    return absl::FailedPreconditionError(
        absl::StrCat("--listen ", options.listen,
                     " can be reached from other hosts, so it needs --tls-cert, --tls-key and "
                     "--tls-ca; without them listen on "
                     "127.0.0.1, localhost or unix:/PATH"));
  }
  if (given == 0 && !options.peer_listen.empty() && !IsLocalAddress(options.peer_listen)) {
    return absl::FailedPreconditionError(
        absl::StrCat("--peer-listen ", options.peer_listen,
                     " can be reached from other hosts, so it needs --tls-cert, --tls-key and "
                     "--tls-ca"));
  }
  if (given == 0) {
    for (const PeerAddress& peer : options.peers) {
      for (const std::string& address : {peer.address, peer.peer_address}) {
        if (IsLocalAddress(address)) continue;
        return absl::FailedPreconditionError(
            absl::StrCat("--peers ", peer.name, "=", address,
                         " is on another host: give --tls-cert, --tls-key and --tls-ca"));
      }
    }
  }
  return absl::OkStatus();
}

// Sets `peer_listen` if this server has peers.
absl::Status FindPeerDoor(Options* options) {
  if (options->peer_listen.empty()) {
    if (options->peers.size() == 1) return absl::OkStatus();
    const PeerAddress& self = options->self();
    const bool is_default = self.peer_address == DefaultPeerAddress(self.address);
    options->peer_listen = is_default ? DefaultPeerAddress(options->listen) : self.peer_address;
  }
  if (absl::Status status = CheckPort(options->peer_listen); !status.ok())
    return absl::InvalidArgumentError(absl::StrCat("--peer-listen ", status.message()));
  if (options->peer_listen == options->listen)
    return absl::InvalidArgumentError(absl::StrCat("--peer-listen ", options->peer_listen,
                                                   " is --listen too: give each door an address"));
  return absl::OkStatus();
}

}  // namespace

const PeerAddress& Options::self() const {
  return *std::find_if(peers.begin(), peers.end(),
                       [this](const PeerAddress& peer) { return peer.name == name; });
}

absl::StatusOr<uint64_t> ParseBytes(absl::string_view text) {
  static const auto* units = new std::map<std::string, double, std::less<>>{
      {"", 1},        {"k", 1e3},     {"M", 1e6},     {"G", 1e9},    {"T", 1e12},
      {"Ki", 0x1p10}, {"Mi", 0x1p20}, {"Gi", 0x1p30}, {"Ti", 0x1p40}};
  const size_t digits = std::min(text.find_first_not_of("0123456789."), text.size());
  std::string unit(text.substr(digits));
  if (!unit.empty() && unit.back() == 'B') unit.pop_back();
  const auto factor = units->find(unit);
  double number = 0;
  const absl::string_view figure = text.substr(0, digits);
  if (factor == units->end() || !absl::SimpleAtod(figure, &number)) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is not a number of bytes such as 4GiB, 512MiB or 1.5G"));
  }
  const double bytes = number * factor->second;
  if (bytes > static_cast<double>(kMaxMemoryBytes)) {
    return absl::InvalidArgumentError(absl::StrCat("'", text, "' is over the limit of 2^60 bytes"));
  }
  return static_cast<uint64_t>(bytes);
}

absl::StatusOr<int64_t> ParseDuration(absl::string_view text) {
  if (text == "never") return 0;
  static const auto* units = new std::map<std::string, int64_t, std::less<>>{
      {"ms", 1}, {"s", 1000}, {"min", 60'000}, {"h", 3'600'000}};
  constexpr int64_t kYearMs = int64_t{365} * 24 * 3'600'000;
  const size_t digits = std::min(text.find_first_not_of("0123456789"), text.size());
  const auto unit = units->find(std::string(text.substr(digits)));
  int64_t number = 0;
  if (unit == units->end() || !absl::SimpleAtoi(text.substr(0, digits), &number))
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is not a time such as 90s, 10min or 2h, nor never"));
  if (number < 1 || number > kYearMs / unit->second)
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is not from 1ms to a year; never turns it off"));
  return number * unit->second;
}

std::string DefaultPeerAddress(absl::string_view address) {
  if (absl::StartsWith(address, "unix:")) return absl::StrCat(address, ".peer");
  const size_t colon = address.rfind(':');
  uint32_t port = 0;
  if (colon == absl::string_view::npos || !absl::SimpleAtoi(address.substr(colon + 1), &port))
    return std::string(address);  // CheckPort refuses it
  return absl::StrCat(address.substr(0, colon + 1), port + 1);
}

absl::StatusOr<std::vector<PeerAddress>> ParsePeers(absl::string_view text) {
  std::vector<PeerAddress> peers;
  std::set<std::string> names;
  for (absl::string_view entry : absl::StrSplit(text, ',', absl::SkipWhitespace())) {
    entry = absl::StripAsciiWhitespace(entry);
    const size_t equals = entry.find('=');
    PeerAddress peer;
    peer.name = std::string(entry.substr(0, equals));
    const std::vector<std::string> addresses =
        absl::StrSplit(equals == absl::string_view::npos ? entry : entry.substr(equals + 1),
                       absl::MaxSplits('@', 1));
    peer.name = peer.name.substr(
        0, equals == absl::string_view::npos ? peer.name.find('@') : std::string::npos);
    peer.address = addresses[0];
    peer.peer_address = addresses.size() > 1 ? addresses[1] : DefaultPeerAddress(peer.address);
    for (const std::string& address : {peer.address, peer.peer_address})
      if (absl::Status status = CheckPort(address); !status.ok()) return status;
    if (peer.name.empty() || peer.name.size() > kMaxNameBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("peer '", entry, "' needs a name of 1 to ", kMaxNameBytes, " bytes"));
    }
    if (!names.insert(peer.name).second)
      return absl::InvalidArgumentError(absl::StrCat("peer '", peer.name, "' is listed twice"));
    peers.push_back(std::move(peer));
  }
  if (peers.size() > kMaxServers) {
    return absl::InvalidArgumentError(
        absl::StrCat(peers.size(), " peers; the limit is ", kMaxServers));
  }
  std::sort(peers.begin(), peers.end(),
            [](const PeerAddress& a, const PeerAddress& b) { return a.name < b.name; });
  return peers;
}

absl::Status ApplyToml(absl::string_view text, const std::string& file, Options* options) {
  if (text.find_first_not_of(" \t\r\n") == absl::string_view::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ":1: the file is empty; remove --config or restore it"));
  }
  toml::table root;
  try {
    root = toml::parse(std::string_view(text.data(), text.size()), file);
  } catch (const toml::parse_error& error) {
    return Bad(file, error.source(),
               absl::StrCat("not valid TOML: ", std::string(error.description())));
  }
  for (auto&& [section, node] : root) {
    const std::string name(section.str());
    if (!node.is_table() || KnownKeys(name).empty()) {
      return Bad(
          file, node.source(),
          absl::StrCat("'", name, "' is unknown; sections are [server], [storage] and [tls]"));
    }
    if (absl::Status status = ApplySection(name, *node.as_table(), file, options); !status.ok())
      return status;
  }
  return absl::OkStatus();
}

bool IsLocalAddress(absl::string_view address) {
  if (absl::StartsWith(address, "unix:")) return true;
  const absl::string_view host = address.substr(0, address.rfind(':'));
  in_addr numeric;
  return host == "localhost" || host == "[::1]" ||
         (absl::StartsWith(host, "127.") &&
          inet_pton(AF_INET, std::string(host).c_str(), &numeric) == 1);
}

absl::Status Validate(Options* options) {
  if (absl::Status status = CheckPort(options->listen); !status.ok()) return status;
  if (options->memory_bytes < kMinMemoryBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--memory ", options->memory_bytes, " bytes; the least is ", kMinMemoryBytes, " (64MiB)"));
  }
  static const auto* levels =
      new std::set<std::string>{"trace", "debug", "info", "warning", "error"};
  if (levels->count(options->log_level) == 0) {
    return absl::InvalidArgumentError(absl::StrCat("--log-level '", options->log_level,
                                                   "'; levels are ", absl::StrJoin(*levels, ", ")));
  }
  absl::StatusOr<std::vector<int>> cpus = CpusOf(options->workers);
  if (!cpus.ok())
    return absl::InvalidArgumentError(absl::StrCat("--numa-node: ", cpus.status().message()));
  options->workers = {options->workers.thread_count, *std::move(cpus), -1};
  if (options->data_dir.empty()) return absl::InvalidArgumentError("--data-dir is empty");
  if (absl::Status status = FindSelf(options); !status.ok()) return status;
  if (absl::Status status = FindPeerDoor(options); !status.ok()) return status;
  return CheckTls(*options);
}

absl::StatusOr<Options> ParseCommandLine(int argc, char** argv, int* exit_code) {
  CLI::App app{"orlopd, the Orlop state server: owns weights and optimizer state of training jobs.",
               "orlopd"};
  app.set_version_flag("--version", std::string("orlopd ") + ORLOP_VERSION);
  app.add_flag_callback(
      "--print-rules",
      [] {
        std::cout << RuleTable();
        throw CLI::Success();
      },
      "print which roles may call which RPC, as a table, and exit");
  std::string config_file;
  app.add_option("--config", config_file,
                 "TOML file with [server], [storage] and [tls]; flags win over it");
  std::map<const Setting*, std::string> given;
  for (const Setting& setting : Settings()) {
    app.add_option_function<std::string>(
        setting.flag, [&given, &setting](const std::string& value) { given[&setting] = value; },
        setting.help);
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    *exit_code = app.exit(error);
    return Options();
  }
  Options options;
  if (!config_file.empty()) {
    std::ifstream in(config_file, std::ios::binary);
    std::stringstream text;
    if (!in || !(text << in.rdbuf())) {
      return absl::InvalidArgumentError(
          absl::StrCat("--config ", config_file, ": cannot be read, or is empty"));
    }
    if (absl::Status status = ApplyToml(text.str(), config_file, &options); !status.ok())
      return status;
  }
  for (const auto& [setting, value] : given) {
    absl::Status status = setting->set(value, &options);
    if (!status.ok())
      return absl::InvalidArgumentError(absl::StrCat(setting->flag, ": ", status.message()));
  }
  if (absl::Status status = Validate(&options); !status.ok()) return status;
  return options;
}

}  // namespace orlop::server
