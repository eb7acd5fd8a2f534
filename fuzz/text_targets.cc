// Targets of files that a person writes or passes on: the configuration, roles, and safetensors.
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "base/thread_pool.h"
#include "cli/safetensors.h"
#include "fuzz/mutators.h"
#include "fuzz/target.h"
#include "server/cluster/peer_links.h"
#include "server/config.h"
#include "server/services/roles.h"

namespace orlop::fuzz {
namespace {

// A target of a text.
Target TextTarget(std::function<void(Bytes)> run, const TextHints& hints,
                  std::vector<std::string> seeds) {
  return {std::move(run),
          [hints](Bytes input, size_t max_size, uint32_t seed) {
            return MutateText(hints, AsText(input), max_size, seed);
          },
          std::move(seeds)};
}

// ---- Configuration -----------------------------------------------------------------------------

// The values of flags have parsers of their own, which get the text too.
void RunConfig(Bytes input) {
  const absl::string_view text(reinterpret_cast<const char*>(input.data()), input.size());
  const absl::StatusOr<uint64_t> bytes = server::ParseBytes(text);
  Require(!bytes.ok() || *bytes <= uint64_t{1} << 60, "a number of bytes has its limit");
  const absl::StatusOr<int64_t> every = server::ParseDuration(text);
  Require(!every.ok() || (*every >= 0 && *every <= int64_t{366} * 86'400'000), "and so has a time");
  const absl::StatusOr<std::vector<server::PeerAddress>> peers = server::ParsePeers(text);
  if (peers.ok()) {
    std::set<std::string> names;
    for (const server::PeerAddress& peer : *peers) names.insert(peer.name);
    Require(names.size() == peers->size(), "names of peers differ");
  }
  (void)ParseCpuList(text);
  (void)server::DefaultPeerAddress(text);
  (void)server::IsLocalAddress(text);
  server::Options options;
  if (!server::ApplyToml(text, "orlop.toml", &options).ok()) return;
  if (!server::Validate(&options).ok()) return;
  Require(options.self().name == options.name, "a server finds itself among its peers");
  Require(options.memory_bytes >= uint64_t{64} << 20, "the memory has its least");
}

TextHints ConfigHints() {
  TextHints hints;
  hints.parts = {"[server]",
                 "[storage]",
                 "[tls]",
                 "listen = \"127.0.0.1:7070\"",
                 "listen = \"unix:/tmp/orlop.sock\"",
                 "peer_listen = \"127.0.0.1:7071\"",
                 "name = \"a\"",
                 "peers = [\"a=127.0.0.1:1\", \"b=127.0.0.1:3@127.0.0.1:9\"]",
                 "peers = \"127.0.0.1:7070\"",
                 "failure_domain = \"rack\"",
                 "log_level = \"debug\"",
                 "threads = 4",
                 "cpus = \"0-3,8\"",
                 "numa_node = 0",
                 "data_dir = \"d\"",
                 "memory = \"4GiB\"",
                 "flush_every = \"10min\"",
                 "flush_every = \"never\"",
                 "rollback = \"auto\"",
                 "cert = \"c\"",
                 "key = \"k\"",
                 "ca = \"a\"",
                 "roles = \"r\"",
                 "threads = [1, 2]",
                 "memory = 1.5",
                 "[[server]]",
                 "[other]"};
  hints.words = {"0",   "1",     "-1",   "65535",     "65536", "4294967295", "99999999999999999999",
                 "Ki",  "MiB",   "1.5G", "10.0.0.1",  "ms",    "s",          "h",
                 "ask", "error", "1024", "localhost", "unix",  "listen"};
  return hints;
}

std::vector<std::string> ConfigSeeds() {
  return {
      "[server]\nlisten = \"127.0.0.1:7070\"\nname = \"a\"\n"
      "peers = [\"a=127.0.0.1:7070\", \"b=127.0.0.1:7072\"]\nthreads = 4\ncpus = \"0-1\"\n"
      "[storage]\nmemory = \"4GiB\"\nflush_every = \"10min\"\nrollback = \"ask\"\n",
      "[server]\nlisten = \"0.0.0.0:1\"\n[tls]\ncert = \"c\"\nkey = \"k\"\nca = \"a\"\n"
      "roles = \"r\"\n",
      "[server]\nlisten = \"10.0.0.1:7070\"\n",
      "[server]\nlisten = \"127.0.0.1:1\"\npeer_listen = \"127.0.0.1:1\"\n",
      "[storage]\nmemory = \"1\"\n",
      "[storage]\nrollback = \"x\"\n",
      "[tls]\ncert = \"c\"\nkey = \"k\"\nca = \"a\"\n",
      "0s",
      "a=host:1@host:9,b=unix:/p",
      "1.5GiB",
      "90s",
      "never",
      "0-3,8",
      "unix:/tmp/x",
      "[server]\nnuma_node = 0\nlisten = \"unix:/x\"\n"};
}

// ---- Roles -------------------------------------------------------------------------------------

void RunRoles(Bytes input) {
  (void)server::FindRule(AsText(input));
  const absl::StatusOr<server::Access> access = server::Access::Parse(AsText(input), "roles.toml");
  if (!access.ok()) return;
  const server::Rule* const rule = server::FindRule("/orlop.v1.Job/Join");
  for (const std::vector<std::string>& names :
       {std::vector<std::string>{}, {"trainer.team-a"}, {"*"}, {"trainer.team-b", "x"}}) {
    const server::Identity identity = access->Of(names, "a caller");
    for (const std::string_view job : {"", "team-a/x", "job"})
      Require(identity.Check(*rule, job).ok() == identity.May(rule->roles, job),
              "a check says what may be");
  }
}

TextHints RolesHints() {
  TextHints hints;
  hints.parts = {"[[grant]]",
                 "[[revoked]]",
                 "name = \"trainer.team-a\"",
                 "name = \"trainer.team-b\"",
                 "name = \"*\"",
                 "roles = [\"worker\", \"saver\"]",
                 "roles = [\"operator\", \"auditor\", \"reader\", \"peer\"]",
                 "jobs = [\"team-a/*\"]",
                 "jobs = \"job\"",
                 "jobs = []",
                 "roles = \"worker\"",
                 "[grant]",
                 "extra = 1",
                 "grant = [1]",
                 "revoked = [\"a\"]"};
  hints.words = {"worker", "reader", "saver", "operator", "auditor", "peer", "name", "jobs", "1"};
  return hints;
}

std::vector<std::string> RolesSeeds() {
  return {
      "[[grant]]\nname = \"trainer.team-a\"\nroles = [\"worker\", \"saver\"]\n"
      "jobs = [\"team-a/*\"]\n[[revoked]]\nname = \"trainer.team-b\"\n",
      "[[grant]]\nname = \"*\"\nroles = [\"peer\"]\n",
      "grant = 1",
      "[[grant]]\nroles = 1\n",
      "[[revoked]]\n",
      "[[grant]]\nname = \"*\"\nroles = [\"worker\"]\njobs = [\"job\"]\n",
      "[[grant]]\nname = \"*\"\nroles = [\"\"]\n"};
}

// ---- Safetensors -------------------------------------------------------------------------------

// Writes a file in memory and returns its path.
class MemoryFile {
 public:
  MemoryFile() : file_(memfd_create("fuzz", MFD_CLOEXEC)) {}
  std::string Fill(std::string_view bytes) const {
    Require(ftruncate(file_, 0) == 0 &&
                pwrite(file_, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()),
            "a file in memory can be written");
    return absl::StrCat("/proc/self/fd/", file_);
  }

 private:
  const int file_;
};

// An input is a byte and a text. The byte is the number of bytes of data behind the text, which is
// the header of the file; 255: the text is the whole file.
void RunSafetensors(Bytes input) {
  if (input.empty()) return;
  static const auto* const file = new MemoryFile();
  const std::string_view text = AsText(input.subspan(1));
  std::string bytes(text);
  if (input[0] != 255) {
    const uint64_t size = text.size();
    bytes = std::string(reinterpret_cast<const char*>(&size), 8) + bytes;
    bytes.append(input[0], 'd');
  }
  const auto reader = cli::SafetensorsReader::Open(file->Fill(bytes));
  if (!reader.ok()) return;
  uint64_t last = 0;
  for (const cli::SafetensorsEntry& entry : reader->entries()) {
    Require(entry.begin >= last, "entries are in the order of their data");
    last = entry.begin;
    std::string data(entry.end - entry.begin, '\0');
    Require(reader->Read(entry, 0, absl::MakeSpan(data)).ok(), "the data of an entry is there");
    Require(!reader->Read(entry, 1, absl::MakeSpan(data)).ok(), "and ends there");
  }
}

TextHints SafetensorsHints() {
  TextHints hints;
  hints.separator = ',';
  hints.parts = {R"("w":{"dtype":"F32")",
                 R"("shape":[1])",
                 R"("shape":[2,1])",
                 R"("shape":[])",
                 R"("data_offsets":[0)",
                 R"(4]})",
                 R"(8]})",
                 R"("b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]})",
                 R"({"__metadata__":{"k":"v"})",
                 R"({"w":[]})",
                 R"({})"};
  hints.words = {"F64",
                 "F32",
                 "F16",
                 "BF16",
                 "I64",
                 "I32",
                 "I16",
                 "I8",
                 "U8",
                 "BOOL",
                 "F99",
                 "0",
                 "1",
                 "2",
                 "4",
                 "8",
                 "-1",
                 "70368744177664",
                 "18446744073709551615",
                 "18446744073709551616",
                 "1e3",
                 "null",
                 "dtype",
                 "shape"};
  return hints;
}

std::vector<std::string> SafetensorsSeeds() {
  const std::string header =
      R"({"__metadata__":{"k":"v"},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
      R"("b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}})";
  return {"\7" + header,
          "\6" + header,
          R"(x{"w":[]})",
          "x[1]",
          "\xff\x02",
          std::string("\xff\x02\0\0\0\0\0\0\0{}", 11),
          "\xff\xff\xff\xff\xff\xff\xff\xff\xff{}",
          R"(x{"w":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}})",
          R"(x{"w":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}})"};
}

}  // namespace

Target ConfigTarget() { return TextTarget(RunConfig, ConfigHints(), ConfigSeeds()); }
Target RolesTarget() { return TextTarget(RunRoles, RolesHints(), RolesSeeds()); }
Target SafetensorsTarget() {
  return {RunSafetensors,
          [](Bytes input, size_t max_size, uint32_t seed) {
            static const auto* const hints = new TextHints(SafetensorsHints());
            if (input.empty() || max_size < 2) return MutateBytes(AsText(input), max_size);
            constexpr uint8_t kDataBytes[] = {0, 4, 7, 8, 16, 255};
            const uint8_t data = seed % 7 == 1 ? kDataBytes[seed / 7 % 6] : input[0];
            return std::string(1, static_cast<char>(data)) +
                   MutateText(*hints, AsText(input.subspan(1)), max_size - 1, seed);
          },
          SafetensorsSeeds()};
}

}  // namespace orlop::fuzz
