#include "server/listener.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace orlop::server {
namespace {

// What a listener has handed over.
class Taker {
 public:
  ~Taker() {
    for (const int fd : fds_) close(fd);
  }
  void Take(int kind, int fd) {
    MutexLock lock(&mutex_);
    times_.push_back(std::chrono::steady_clock::now());
    kinds_.push_back(kind);
    fds_.push_back(fd);
  }
  std::vector<int> kinds() const {
    MutexLock lock(&mutex_);
    return kinds_;
  }
  std::chrono::nanoseconds TimeBetween(size_t one, size_t other) const {
    MutexLock lock(&mutex_);
    return times_[other] - times_[one];
  }
  // Ends the oldest connection, as gRPC does.
  void EndOne() {
    MutexLock lock(&mutex_);
    shutdown(fds_.front(), SHUT_RDWR);
    close(fds_.front());
    fds_.erase(fds_.begin());
  }

 private:
  mutable Mutex mutex_;
  std::vector<int> kinds_ GUARDED_BY(mutex_), fds_ GUARDED_BY(mutex_);
  std::vector<std::chrono::steady_clock::time_point> times_ GUARDED_BY(mutex_);
};

int Connect(const std::string& address) {
  if (address.starts_with("unix:")) {
    const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un to = {.sun_family = AF_UNIX, .sun_path = {}};
    std::strncpy(to.sun_path, address.c_str() + 5, sizeof(to.sun_path) - 1);
    EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)), 0);
    return fd;
  }
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in to = {};
  to.sin_family = AF_INET;
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  to.sin_port = htons(static_cast<uint16_t>(std::stoi(address.substr(address.rfind(':') + 1))));
  EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)), 0);
  return fd;
}

// Waits until the other end has closed a connection.
void AwaitEnd(int fd) {
  char byte;
  EXPECT_LE(recv(fd, &byte, 1, 0), 0);
  close(fd);
}

void WaitUntil(const std::function<bool()>& condition) {
  while (!condition()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

class ListenerTest : public testing::TestWithParam<bool> {
 protected:
  ListenerTest() {
    char name[] = "/tmp/orlop-listener-XXXXXX";
    directory_ = mkdtemp(name);
  }
  ~ListenerTest() override {
    for (const char* file : {"/s", "/s.lock"}) unlink((directory_ + file).c_str());
    rmdir(directory_.c_str());
  }
  Listener::Options Options(int most) {
    Listener::Options options;
    options.address = GetParam() ? absl::StrCat("unix:", directory_, "/s") : "localhost:0";
    options.most_connections = most;
    options.admit = [this](int) -> absl::StatusOr<Listener::Admission> {
      ++admitted_;
      if (next_ < 0) return absl::PermissionDeniedError("not you");
      return Listener::Admission{next_, next_ == 1 ? 1 : 1000, next_, uint64_t(next_)};
    };
    options.take = [this](int lane, int, int fd) { taker_.Take(lane, fd); };
    return options;
  }

  std::string directory_;
  std::atomic<int> next_ = 0;  // the kind of new connections; -1: refused
  std::atomic<int> admitted_ = 0;
  Taker taker_;
};

TEST_P(ListenerTest, HandsConnectionsOverUntilTheyAreTooMany) {
  auto listener = Listener::Open(Options(3));
  ASSERT_TRUE(listener.ok()) << listener.status();
  (*listener)->Start();
  const std::string address = (*listener)->address();
  std::vector<int> open = {Connect(address), Connect(address), Connect(address)};
  WaitUntil([&] { return taker_.kinds().size() == 3; });
  AwaitEnd(Connect(address));
  taker_.EndOne();
  WaitUntil([&] {  // the end is seen by another thread
    const int fd = Connect(address);
    const timeval soon = {.tv_sec = 0, .tv_usec = 50'000};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &soon, sizeof(soon));
    char byte;
    const bool is_closed = recv(fd, &byte, 1, 0) == 0;
    open.push_back(fd);
    return !is_closed;
  });
  EXPECT_EQ(taker_.kinds().size(), 4u);
  for (const int fd : open) close(fd);
}

TEST_P(ListenerTest, CountsEachKindApart) {
  auto listener = Listener::Open(Options(100));
  ASSERT_TRUE(listener.ok()) << listener.status();
  (*listener)->Start();
  next_ = 1;
  const int first = Connect((*listener)->address());
  WaitUntil([&] { return taker_.kinds().size() == 1; });
  AwaitEnd(Connect((*listener)->address()));
  next_ = 2;
  const int other = Connect((*listener)->address());
  WaitUntil([&] { return taker_.kinds().size() == 2; });
  next_ = -1;
  AwaitEnd(Connect((*listener)->address()));
  EXPECT_THAT(taker_.kinds(), testing::ElementsAre(1, 2));
  close(first);
  close(other);
}

TEST_P(ListenerTest, CutsOffALaneAndNoOther) {
  auto listener = Listener::Open(Options(100));
  ASSERT_TRUE(listener.ok()) << listener.status();
  (*listener)->Start();
  const int first = Connect((*listener)->address());
  WaitUntil([&] { return taker_.kinds().size() == 1; });
  next_ = 2;
  const int other = Connect((*listener)->address());
  WaitUntil([&] { return taker_.kinds().size() == 2; });
  EXPECT_EQ(send(first, "unread", 6, 0), 6);
  (*listener)->Cut(0);
  AwaitEnd(first);
  char byte;
  EXPECT_EQ(recv(other, &byte, 1, MSG_DONTWAIT), -1);
  EXPECT_EQ(errno, EAGAIN) << "it is open";
  close(other);
}

TEST_P(ListenerTest, HoldsBackAKindUntilWhatWasCutOffIsFreed) {
  auto listener = Listener::Open(Options(100));
  ASSERT_TRUE(listener.ok()) << listener.status();
  (*listener)->Start();
  const std::string address = (*listener)->address();
  const int first = Connect(address);
  WaitUntil([&] { return taker_.kinds().size() == 1; });
  (*listener)->Cut(0);
  AwaitEnd(first);
  const std::vector<int> held = {Connect(address), Connect(address)};
  close(Connect(address));
  WaitUntil([&] { return admitted_ == 4; });
  next_ = 2;
  const int other = Connect(address);
  WaitUntil([&] { return taker_.kinds().size() == 2; });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_THAT(taker_.kinds(), testing::ElementsAre(0, 2)) << "the cut one is not freed";
  taker_.EndOne();
  WaitUntil([&] { return taker_.kinds().size() >= 4; });
  EXPECT_THAT(taker_.kinds(), testing::ElementsAre(0, 2, 0, 0)) << "one has ended before";
  EXPECT_GE(taker_.TimeBetween(2, 3), std::chrono::milliseconds(15)) << "one after the other";
  next_ = 3;
  const int last = Connect(address);
  WaitUntil([&] { return taker_.kinds().size() == 5; });
  for (const int fd : held) close(fd);
  close(other);
  close(last);
}

// The descriptors of a held connection that ends are those of the next one, which may come before
// the listener looks at the first one again.
TEST_P(ListenerTest, HandsEachConnectionOverOnce) {
  const int null_device = open("/dev/null", O_RDONLY);
  std::atomic<bool> is_busy = false;
  Listener::Options options = Options(100);
  options.take = [&is_busy, take = options.take](int lane, int listener_fd, int fd) {
    take(lane, listener_fd, fd);
    WaitUntil([&] { return !is_busy; });
  };
  auto listener = Listener::Open(options);
  ASSERT_TRUE(listener.ok()) << listener.status();
  (*listener)->Start();
  const std::string address = (*listener)->address();
  const int first = Connect(address);
  WaitUntil([&] { return taker_.kinds().size() == 1; });
  (*listener)->Cut(0);
  AwaitEnd(first);
  const int next = Connect(address), ends = Connect(address);
  WaitUntil([&] { return admitted_ == 3; });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  is_busy = true;
  taker_.EndOne();
  WaitUntil([&] { return taker_.kinds().size() == 2; });
  std::vector<int> fillers(16);  // no lower number is free
  for (int& filler : fillers) filler = dup(null_device);
  close(ends);
  const int last = Connect(address);
  is_busy = false;
  WaitUntil([&] { return taker_.kinds().size() >= 3; });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_EQ(taker_.kinds().size(), 3u);
  fillers.insert(fillers.end(), {next, last, null_device});
  for (const int fd : fillers) close(fd);
}

TEST_P(ListenerTest, ClosesWhatItHolds) {
  const auto descriptors = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), {});
  };
  const auto before = descriptors();
  int held = -1, first = -1;
  {
    auto listener = Listener::Open(Options(100));
    ASSERT_TRUE(listener.ok()) << listener.status();
    (*listener)->Start();
    first = Connect((*listener)->address());
    WaitUntil([&] { return taker_.kinds().size() == 1; });
    (*listener)->Cut(0);
    held = Connect((*listener)->address());
    WaitUntil([&] { return admitted_ == 2; });
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    EXPECT_EQ(taker_.kinds().size(), 1u);
  }
  AwaitEnd(held);
  close(first);
  taker_.EndOne();
  EXPECT_EQ(descriptors(), before);
}

TEST_P(ListenerTest, AnAddressInUseIsRefusedAndFreeAfterwards) {
  auto listener = Listener::Open(Options(1));
  ASSERT_TRUE(listener.ok()) << listener.status();
  auto options = Options(1);
  options.address = (*listener)->address();
  EXPECT_TRUE(absl::IsUnavailable(Listener::Open(options).status()));
  (*listener)->Close();
  const auto again = Listener::Open(options);
  EXPECT_TRUE(again.ok()) << again.status();
}

INSTANTIATE_TEST_SUITE_P(Addresses, ListenerTest, testing::Values(true, false));

TEST(Listener, AUnixSocketIsItsUsersAloneUnlessToldOtherwise) {
  for (const bool is_for_others : {false, true}) {
    char name[] = "/tmp/orlop-listener-XXXXXX";
    const std::string directory = mkdtemp(name), path = directory + "/s";
    Listener::Options options;
    options.address = "unix:" + path;
    options.is_for_others = is_for_others;
    {
      const auto listener = Listener::Open(options);
      ASSERT_TRUE(listener.ok()) << listener.status();
      struct stat found = {};
      ASSERT_EQ(stat(path.c_str(), &found), 0);
      EXPECT_EQ(found.st_mode & 0777, is_for_others ? 0666u : 0600u);
    }
    EXPECT_NE(access(path.c_str(), F_OK), 0) << "the path is free again";
    unlink((path + ".lock").c_str());
    rmdir(directory.c_str());
  }
}

TEST(Listener, NamesAHostThatIsUnknown) {
  Listener::Options options;
  options.address = "no.such.host.invalid:0";
  const auto listener = Listener::Open(options);
  EXPECT_TRUE(absl::IsInvalidArgument(listener.status())) << listener.status();
  EXPECT_THAT(std::string(listener.status().message()), testing::HasSubstr("no.such.host"));
}

}  // namespace
}  // namespace orlop::server
