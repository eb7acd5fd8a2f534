#include "server/config.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/limits.h"

namespace orlop::server {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::string TomlError(const std::string& text) {
  Options options;
  return std::string(ApplyToml(text, "orlopd.toml", &options).message());
}

TEST(Config, BytesAreReadAsKubernetesWritesThem) {
  EXPECT_EQ(*ParseBytes("4GiB"), uint64_t{4} << 30);
  EXPECT_EQ(*ParseBytes("512Mi"), uint64_t{512} << 20);
  EXPECT_EQ(*ParseBytes("1.5G"), 1500000000u);
  EXPECT_EQ(*ParseBytes("1048576"), 1048576u);
  for (const char* bad : {"", "GiB", "4XB", "-1", "4 GiB", "1e9", "9999999TiB", "1.2.3M"}) {
    EXPECT_FALSE(ParseBytes(bad).ok()) << bad;
  }
}

TEST(Config, FileFillsEverySection) {
  Options options;
  ASSERT_TRUE(ApplyToml("[server]\nlisten = \"127.0.0.1:7001\"\npeers = [\"b=127.0.0.1:7002\", "
                        "\"a=127.0.0.1:7001\"]\n"
                        "[storage]\ndata_dir = \"/var/lib/orlop\"\nmemory = \"1GiB\"\n",
                        "orlopd.toml", &options)
                  .ok());
  ASSERT_TRUE(Validate(&options).ok());
  EXPECT_EQ(options.name, "a");
  EXPECT_EQ(options.peers[1].address, "127.0.0.1:7002");
  EXPECT_EQ(options.memory_bytes, uint64_t{1} << 30);
  EXPECT_EQ(options.data_dir, "/var/lib/orlop");
}

TEST(Config, WorkersMayBeCountedAndPlaced) {
  Options options;
  ASSERT_TRUE(
      ApplyToml("[server]\nthreads = 3\ncpus = \"0\"\nnuma_node = 0\n", "orlopd.toml", &options)
          .ok());
  EXPECT_EQ(options.workers.thread_count, 3);
  EXPECT_EQ(options.workers.cpus, std::vector<int>{0});
  EXPECT_EQ(options.workers.numa_node, 0);
  EXPECT_THAT(TomlError("[server]\nthreads = 0\n"), HasSubstr("'0' is not a whole number from 1"));
  EXPECT_THAT(TomlError("[server]\ncpus = \"2-1\"\n"), HasSubstr("'2-1'"));
  options.workers.numa_node = 1000;
  EXPECT_THAT(std::string(Validate(&options).message()),
              HasSubstr("--numa-node: this machine has no NUMA node 1000"));
}

TEST(Config, ErrorsNameFileLineKeyAndValue) {
  EXPECT_THAT(TomlError("[storage]\n\nmemory = \"4XB\"\n"),
              AllOf(HasSubstr("orlopd.toml:3"), HasSubstr("[storage] memory"), HasSubstr("4XB")));
  EXPECT_THAT(
      TomlError("[storage]\nmemroy = \"4GiB\"\n"),
      AllOf(HasSubstr("orlopd.toml:2"), HasSubstr("memroy"), HasSubstr("data_dir, memory")));
  EXPECT_THAT(TomlError("[sever]\n"), AllOf(HasSubstr("orlopd.toml:1"), HasSubstr("sever")));
  EXPECT_THAT(TomlError("[server]\nlisten = true\n"), HasSubstr("must be a string"));
}

TEST(Config, TornFileIsRefused) {
  const std::string whole = "[server]\nlisten = \"127.0.0.1:7001\"\n";
  EXPECT_EQ(TomlError(whole), "");
  EXPECT_THAT(TomlError(""), HasSubstr("empty"));
  for (size_t bytes = 1; bytes + 2 < whole.size(); ++bytes) {
    if (bytes == 8 || bytes == 9) continue;  // "[server]" alone is a whole file
    EXPECT_NE(TomlError(whole.substr(0, bytes)), "") << bytes;
  }
}

TEST(Config, PlaintextOffLoopbackIsRefusedNamingTheFlags) {
  Options options;
  options.listen = "0.0.0.0:7070";
  const absl::Status status = Validate(&options);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("--tls-cert"), HasSubstr("--tls-key"), HasSubstr("--tls-ca")));
  options.tls_cert = options.tls_key = options.tls_ca = "file.pem";
  EXPECT_THAT(std::string(Validate(&options).message()), HasSubstr("--roles"));
  options.roles = "roles.toml";
  EXPECT_TRUE(Validate(&options).ok());
  Options plain;
  plain.roles = "roles.toml";
  EXPECT_TRUE(Validate(&plain).ok()) << "for other users of this host";
}

TEST(Config, NameThatBeginsLikeLoopbackIsNotLoopback) {
  for (const char* local : {"127.0.0.1:1", "127.8.8.8:1", "localhost:1", "[::1]:1", "unix:/tmp/s"})
    EXPECT_TRUE(IsLocalAddress(local)) << local;
  for (const char* remote : {"127.anything.example.com:1", "127.0.0.1.example.com:1", "127.:1",
                             "127.0.0.256:1", "localhost.example.com:1", "10.0.0.1:1"})
    EXPECT_FALSE(IsLocalAddress(remote)) << remote;
}

TEST(Config, ServerFindsItselfAmongPeers) {
  Options options;
  options.listen = "unix:/tmp/b.sock";
  options.peers = *ParsePeers("a=unix:/tmp/a.sock,b=unix:/tmp/b.sock");
  ASSERT_TRUE(Validate(&options).ok());
  EXPECT_EQ(options.self().name, "b");
  Options lost;
  lost.listen = "127.0.0.1:9";
  lost.peers = options.peers;
  EXPECT_THAT(std::string(Validate(&lost).message()), HasSubstr("--name"));
  EXPECT_THAT(std::string(ParsePeers("a=h:1,a=h:2").status().message()), HasSubstr("twice"));
  EXPECT_FALSE(ParsePeers("a=nowhere").ok());
  std::string most = "first=h:1";
  for (size_t i = 1; i < kMaxServers; ++i) absl::StrAppend(&most, ",", i, "=h:1");
  EXPECT_EQ(ParsePeers(most).value().size(), 1024u);
  EXPECT_THAT(std::string(ParsePeers(most + ",last=h:1").status().message()),
              HasSubstr("1025 peers; the limit is 1024"));
  EXPECT_FALSE(ParsePeers("a=host:70000").ok());
}

TEST(Config, PeersHaveADoorOfTheirOwn) {
  const auto door = [](const std::string& listen, const std::string& peers,
                       const std::string& peer_listen = "") {
    Options options;
    options.listen = listen;
    options.peer_listen = peer_listen;
    if (!peers.empty()) options.peers = ParsePeers(peers).value();
    options.name = peers.empty() ? "" : "a";
    const absl::Status status = Validate(&options);
    return status.ok() ? options.peer_listen : std::string(status.message());
  };
  EXPECT_EQ(door("127.0.0.1:7070", ""), "");  // a server alone
  EXPECT_EQ(door("127.0.0.1:7070", "a=127.0.0.1:7070,b=127.0.0.1:8070"), "127.0.0.1:7071");
  EXPECT_EQ(door("127.0.0.2:7070", "a=127.0.0.1:7070,b=127.0.0.1:8070"), "127.0.0.2:7071");
  EXPECT_EQ(door("unix:/tmp/a", "a=unix:/tmp/a,b=unix:/tmp/b"), "unix:/tmp/a.peer");
  EXPECT_EQ(door("127.0.0.1:7070", "a=127.0.0.1:7070@127.0.0.1:9,b=127.0.0.1:1"), "127.0.0.1:9");
  EXPECT_EQ(door("127.0.0.1:7070", "a=127.0.0.1:7070,b=127.0.0.1:1", "127.0.0.1:5"), "127.0.0.1:5");
  EXPECT_EQ(door("127.0.0.1:7070", "", "127.0.0.1:5"), "127.0.0.1:5");
  EXPECT_THAT(door("127.0.0.1:7070", "", "127.0.0.1:7070"), HasSubstr("--listen too"));
  EXPECT_THAT(door("127.0.0.1:7070", "", "nowhere"), HasSubstr("--peer-listen"));
  EXPECT_THAT(door("127.0.0.1:7070", "", "10.0.0.1:7071"), HasSubstr("--tls-cert"));
  EXPECT_THAT(door("127.0.0.1:65535", "a=127.0.0.1:65535@127.0.0.1:1,b=127.0.0.1:2"),
              HasSubstr("127.0.0.1:1"));
  EXPECT_THAT(std::string(ParsePeers("a=127.0.0.1:65535").status().message()), HasSubstr("65536"));
  EXPECT_EQ(ParsePeers("h:1@g:2").value()[0].name, "h:1");
  EXPECT_EQ(ParsePeers("h:1@g:2").value()[0].peer_address, "g:2");
}

TEST(Config, TimesHaveAUnitAndLimits) {
  EXPECT_EQ(ParseDuration("200ms").value(), 200);
  EXPECT_EQ(ParseDuration("90s").value(), 90'000);
  EXPECT_EQ(ParseDuration("10min").value(), 600'000);
  EXPECT_EQ(ParseDuration("8760h").value(), int64_t{365} * 24 * 3'600'000);
  EXPECT_EQ(ParseDuration("never").value(), 0);
  for (const char* bad : {"", "10", "min", "-1s", "0s", "8761h", "1.5h", "10 min", "10minutes",
                          "9223372036854775807s", "99999999999999999999s"})
    EXPECT_THAT(std::string(ParseDuration(bad).status().message()),
                HasSubstr(absl::StrCat("'", bad, "'")));
}

TEST(Config, LimitsAreToldWithTheValue) {
  Options options;
  options.memory_bytes = 1000;
  EXPECT_THAT(std::string(Validate(&options).message()),
              AllOf(HasSubstr("1000"), HasSubstr("64MiB")));
  Options half_tls;
  half_tls.tls_cert = "cert.pem";
  EXPECT_THAT(std::string(Validate(&half_tls).message()), HasSubstr("all three"));
}

}  // namespace
}  // namespace orlop::server
