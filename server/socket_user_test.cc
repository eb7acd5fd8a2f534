#include "server/socket_user.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace orlop::server {
namespace {

// A TCP connection within this process.
class Pair {
 public:
  explicit Pair(bool is_v6) {
    const int listening = socket(is_v6 ? AF_INET6 : AF_INET, SOCK_STREAM, 0);
    sockaddr_in6 v6 = {};
    v6.sin6_family = AF_INET6;
    v6.sin6_addr = in6addr_loopback;
    sockaddr_in v4 = {};
    v4.sin_family = AF_INET;
    v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    auto* address = is_v6 ? reinterpret_cast<sockaddr*>(&v6) : reinterpret_cast<sockaddr*>(&v4);
    socklen_t size = is_v6 ? sizeof(v6) : sizeof(v4);
    if (bind(listening, address, size) != 0) return;
    listen(listening, 1);
    getsockname(listening, address, &size);
    client = socket(is_v6 ? AF_INET6 : AF_INET, SOCK_STREAM, 0);
    EXPECT_EQ(connect(client, address, size), 0);
    server = accept(listening, nullptr, nullptr);
    close(listening);
  }
  ~Pair() {
    close(client);
    close(server);
  }
  int client = -1, server = -1;  // -1: the host has no such addresses
};

TEST(SocketUser, OfATcpConnectionIsThisUser) {
  for (const bool is_v6 : {false, true}) {
    const Pair pair(is_v6);
    if (pair.server < 0) continue;
    const auto user = UserOf(pair.server), by_table = UserByTable(pair.server);
    ASSERT_TRUE(user.ok()) << user.status();
    EXPECT_EQ(*user, geteuid());
    ASSERT_TRUE(by_table.ok()) << by_table.status();
    EXPECT_EQ(*by_table, geteuid());
  }
}

TEST(SocketUser, OfAClosedConnectionIsNobody) {
  Pair pair(false);
  close(pair.client);
  pair.client = -1;
  EXPECT_TRUE(absl::IsPermissionDenied(UserOf(pair.server).status()));
  EXPECT_TRUE(absl::IsPermissionDenied(UserByTable(pair.server).status()));
}

TEST(SocketUser, OfAUnixSocketIsThisUser) {
  int ends[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
  const auto user = UserOf(ends[0]);
  ASSERT_TRUE(user.ok()) << user.status();
  EXPECT_EQ(*user, geteuid());
  close(ends[0]);
  close(ends[1]);
}

TEST(SocketUser, HasANameAndANumber) {
  EXPECT_THAT(NamesOf(0), testing::ElementsAre("user:root", "user:0"));
  EXPECT_THAT(NamesOf(4'000'000'000u), testing::ElementsAre("user:4000000000"));
}

}  // namespace
}  // namespace orlop::server
