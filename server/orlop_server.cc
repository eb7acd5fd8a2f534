#include "server/orlop_server.h"

#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "base/thread_pool.h"
#include "kernels/targets.h"
#include "orlop/v1/peer.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "server/cluster/peer_links.h"
#include "server/config.h"
#include "server/credentials.h"
#include "server/door.h"
#include "server/local_users.h"
#include "server/memory/message_room.h"
#include "server/memory/process_memory.h"
#include "server/memory/read_room.h"
#include "server/memory/request_room.h"
#include "server/role_file.h"
#include "server/runtime/environment.h"
#include "server/services/admin_service.h"
#include "server/services/data_service.h"
#include "server/services/gate.h"
#include "server/services/job_service.h"
#include "server/services/peer_service.h"
#include "server/services/readiness.h"
#include "server/services/roles.h"
#include "server/tiers/tier.h"
#include "spdlog/spdlog.h"
#include "storage/data_directory.h"

namespace orlop::server {
namespace {

// The period of TickLoop.
constexpr auto kTick = std::chrono::milliseconds(250);
// The heap is trimmed after this many ticks in which no pushed message arrived. That is longer than
// most training steps, so the heap is not trimmed while a job trains.
constexpr int kRestTicks = 8;
// Stop waits this long for other servers and for disk space. The flush itself has no limit.
constexpr auto kStopTimeout = std::chrono::seconds(60);
// The limit that RocksDB is given for its own memory, and what is reserved beyond it. RocksDB can
// exceed its limit: it completes a write before it stalls the next one, and a block that is being
// read cannot be evicted.
// Each of its write buffers, an eighth, becomes two files that are synced, so that a flush of much
// state is bound by their number if they are small.
uint64_t StoreMemoryBytes(uint64_t memory_bytes) {
  return std::clamp<uint64_t>(memory_bytes / 32, uint64_t{16} << 20, uint64_t{256} << 20);
}
constexpr uint64_t kStoreSlackBytes = uint64_t{2} << 20;
constexpr int kCallThreads = 8, kPeerThreads = 4;
// A server looks at no more peers than this in one tick. It looks at each of them once a second or,
// in a large cluster, less often.
constexpr int kLooksPerTick = 8;

// A call that waits takes some 17 KiB of gRPC.
int MaxCalls(uint64_t memory_bytes) {
  return static_cast<int>(std::clamp<uint64_t>(memory_bytes >> 16, 1024, kMaxCalls));
}

// A stream that waits for its client takes some 16 KiB.
int MaxStreams(uint64_t memory_bytes) {
  return static_cast<int>(std::clamp<uint64_t>(memory_bytes >> 16, 1024, 8192));
}

// The process may open as many files as the system allows; returns how many that is.
int RaiseFileLimit() {
  rlimit files = {};
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  getrlimit(RLIMIT_NOFILE, &files);
  return static_cast<int>(std::min<rlim_t>(files.rlim_cur, 1 << 20));
}

// Each server may have two connections to each other one, while an old one ends.
int MaxPeerConnections(const Options& options) {
  return 2 * static_cast<int>(options.peers.size()) + 16;
}

// A connection takes some 16 KiB and two descriptors. RocksDB and links to peers need some too.
int MaxConnections(const Options& options) {
  const int left = RaiseFileLimit() - 512 - 3 * MaxPeerConnections(options);
  return std::clamp(left / 2, 16,
                    static_cast<int>(std::clamp<uint64_t>(options.memory_bytes >> 15, 2048, 8192)));
}

// They copy and hash, which takes one thread for each processor, and wait for the disk, which may
// take more.
int StreamThreads() {
  return static_cast<int>(std::clamp(2 * std::thread::hardware_concurrency(), 8u, 64u));
}

// The implementation of OrlopServer.
class Running : public OrlopServer {
 public:
  explicit Running(const Options& options) : options_(options), accountant_(Limits(options)) {}

  ~Running() override {
    if (!stopped_.exchange(true)) Halt();
  }

  absl::Status Open(const std::atomic<bool>* is_ending) {
    absl::StatusOr<Credentials> credentials = MakeCredentials(options_);
    if (!credentials.ok()) return credentials.status();
    if (!options_.roles.empty()) {
      auto roles = RoleFile::Open(options_.roles);
      if (!roles.ok()) return roles.status();
      roles_ = *std::move(roles);
    }
    if (!options_.tls()) users_ = std::make_unique<LocalUsers>(roles_.get());
    auto data = storage::DataDirectory::Open(
        {options_.data_dir, options_.name, StoreMemoryBytes(options_.memory_bytes)});
    if (!data.ok()) return data.status();
    data_ = *std::move(data);
    accountant_.emplace_nvme(*data_);
    auto tiers =
        Tiers::Create(&accountant_.value(), &data_->store(), [this] { return data_->FreeBytes(); });
    if (!tiers.ok()) return tiers.status();
    tiers_ = *std::move(tiers);
    absl::StatusOr<Reservation> rocksdb = tiers_->Reserve(
        {Tier::kDram, "", "rocksdb"}, StoreMemoryBytes(options_.memory_bytes) + kStoreSlackBytes);
    if (!rocksdb.ok()) return rocksdb.status();
    {
      MutexLock lock(&store_mutex_);
      rocksdb_ = *std::move(rocksdb);
    }
    absl::StatusOr<Reservation> room = tiers_->Reserve(
        {Tier::kDram, "", "messages"}, MessageRoom::BytesFor(options_.memory_bytes));
    if (!room.ok()) return room.status();
    messages_ = std::make_unique<MessageRoom>(*std::move(room));
    for (auto [requests, most_bytes] :
         {std::pair(&requests_, RequestRoom::MostBytesFor(options_.memory_bytes)),
          std::pair(&peer_requests_, RequestRoom::MostBytesOfPeersFor(options_.memory_bytes))}) {
      if (requests == &peer_requests_ && options_.peer_listen.empty()) continue;
      const Use use{Tier::kDram, "", "requests"};
      room = tiers_->Reserve(use, RequestRoom::FixedBytesFor(options_.memory_bytes));
      if (!room.ok()) return room.status();
      *requests = std::make_unique<RequestRoom>(
          *std::move(room), most_bytes,
          [this, use](uint64_t bytes) { return tiers_->Reserve(use, bytes); });
    }
    return Listen(*credentials, is_ending);
  }

  const std::string& address() const override { return address_; }
  bool ready() const override { return readiness_->is_ready(); }

  absl::Status Stop() override {
    if (stopped_.exchange(true)) return absl::OkStatus();
    spdlog::info("stopping: finishing what is decided, then flushing");
    readiness_->End();
    door_->SetServing(false);
    const absl::Status flushed = jobs_->Stop(std::chrono::steady_clock::now() + kStopTimeout);
    Halt();
    return flushed;
  }

 private:
  // Creates the accountant late: its NVMe limit depends on the free bytes of the disk, which are
  // known once the data directory is open.
  struct Budget {
    explicit Budget(uint64_t dram) : dram_bytes(dram) {}
    void emplace_nvme(const storage::DataDirectory& data) {
      // Flushes and spilled values may take nine tenths of what is free or taken by the flushes of
      // before. RocksDB's log and compactions need the rest.
      accountant = std::make_unique<Accountant>(Accountant::Limits{
          dram_bytes, (data.FreeBytes().value_or(0) + data.StoreBytes()) / 10 * 9});
    }
    Accountant& value() { return *accountant; }
    uint64_t dram_bytes;
    std::unique_ptr<Accountant> accountant;
  };
  static Budget Limits(const Options& options) { return Budget(options.memory_bytes); }

  absl::Status Listen(const Credentials& credentials, const std::atomic<bool>* is_ending) {
    peers_ = std::make_unique<PeerLinks>(options_.peers, credentials.channel);
    const ThreadPlacement& workers = options_.workers;
    const auto processors =
        workers.cpus.empty() ? static_cast<int>(std::max(1u, std::thread::hardware_concurrency()))
                             : static_cast<int>(workers.cpus.size());
    pool_ = std::make_unique<ThreadPool>(
        workers.thread_count > 0 ? workers.thread_count : processors, workers.cpus);
    if (!pool_->pinned().ok()) spdlog::warn("--cpus: {}", std::string(pool_->pinned().message()));
    Environment environment;
    for (const PeerAddress& peer : options_.peers) {
      if (peer.name == options_.name)
        environment.self = static_cast<int>(environment.server_names.size());
      environment.server_names.push_back(peer.name);
    }
    environment.data = data_.get();
    environment.tiers = tiers_.get();
    environment.pool = pool_.get();
    environment.peers = peers_.get();
    const auto identity = [this] { return ServerIdentity(); };
    environment.identity = identity;
    environment.flush_every_ms = options_.flush_every_ms;
    environment.accepts_rollback = options_.accepts_rollback;
    environment.is_ending = is_ending;
    jobs_ = std::make_unique<JobTable>(environment);
    readiness_ = std::make_unique<Readiness>(jobs_.get(), [this] {
      door_->SetServing(true);
      spdlog::info("ready");
    });
    if (absl::Status complete = MakeServices(identity); !complete.ok()) return complete;
    {
      MutexLock lock(&mutex_);
      facts_.started = std::chrono::steady_clock::now();
      facts_.data_dir = options_.data_dir;
    }
    if (absl::Status status = OpenDoors(credentials); !status.ok()) return status;
    {
      // Calls are being answered, and ServerStatus reads facts_.
      MutexLock lock(&mutex_);
      facts_.baseline_bytes = ResidentBytes();
    }
    if (absl::Status status = jobs_->OpenAll(); !status.ok()) {
      Halt();
      stopped_ = true;
      return status;
    }
    peers_->SetOnAnswer(
        [this](int server, const v1::StepMessage& message, const absl::Status& answer) {
          OnPeerAnswer(server, message, answer);
        });
    ticker_ = std::thread([this] { TickLoop(); });
    spdlog::info("{} listens on {}, data in {}, {} kernels", options_.name, address_,
                 options_.data_dir, kernels::TargetName(kernels::SupportedTargets().front()));
    readiness_->Start();
    return absl::OkStatus();
  }

  absl::Status MakeServices(const std::function<v1::ServerInfo()>& identity) {
    data_service_ = std::make_unique<DataService>(jobs_.get(), messages_.get(), &reads_);
    job_service_ = std::make_unique<JobService>(jobs_.get());
    peer_service_ = std::make_unique<PeerService>(jobs_.get(), identity);
    admin_service_ =
        std::make_unique<AdminService>(jobs_.get(), &accountant_.value(), identity, [this] {
          CountStore();
          MutexLock lock(&mutex_);
          return facts_;
        });
    data_service_->AddTo(&rpcs_);
    job_service_->AddTo(&rpcs_);
    admin_service_->AddTo(&rpcs_);
    peer_service_->AddTo(&rpcs_);
    return rpcs_.Check();
  }

  // A server that does not know a job says so when it receives a message about it. It then gets the
  // job's definition.
  void OnPeerAnswer(int server, const v1::StepMessage& message, const absl::Status& answer) {
    if (absl::IsNotFound(answer))
      pool_->Submit([this, server, job = message.job()] { jobs_->PutAgain(server, job); });
    if (const auto job = jobs_->Find(message.job()); job.ok())
      (*job)->OnPeerAnswer(server, message, answer);
  }

  // Logs when the data directory goes, and when it is back.
  void LookAtDirectory() {
    const bool was_there = data_->presence().ok();
    data_->Look();
    const absl::Status presence = data_->presence();
    if (was_there && !presence.ok()) spdlog::error("{}", std::string(presence.message()));
    if (!was_there && presence.ok()) spdlog::info("data directory {} is back", data_->path());
  }

  // Asks the next few peers who they are, so that it is known who is silent.
  void LookAtPeers() {
    const int count = static_cast<int>(options_.peers.size());
    const int looks = std::min(kLooksPerTick, (count + 3) / 4);
    for (int i = 0; i < looks && count > 1; ++i) {
      const int at = next_look_++ % count;
      if (at != jobs_->environment().self) peers_->Look(at, [](const PeerLinks::Seen&) {});
    }
  }

  // Reports the memory that RocksDB uses to the accountant. If the reservation becomes too small,
  // logs one warning.
  void CountStore() {
    const uint64_t bytes = data_->store().MemoryBytes();
    MutexLock lock(&store_mutex_);
    const bool fits = rocksdb_.SetUsed(bytes).ok();
    if (!fits && store_fits_)
      spdlog::warn("RocksDB holds {} bytes, more than the {} set aside", bytes,
                   rocksdb_.reserved_bytes());
    store_fits_ = fits;
  }

  // Returns how a door knows who its callers are: by their certificates, or as users of this host.
  std::function<std::shared_ptr<const Identity>(const grpc::AuthContext&)> Identify() const {
    if (options_.tls()) {
      return [this](const grpc::AuthContext& context) {
        return std::make_shared<const Identity>(roles_->access()->Of(context));
      };
    }
    return [this](const grpc::AuthContext& context) { return users_->Of(context); };
  }

  // Opens the doors. From here on calls are answered.
  absl::Status OpenDoors(const Credentials& credentials) {
    gate_ = std::make_unique<Gate>(
        &rpcs_, requests_.get(),
        Gate::Options{kClients, Identify(), MaxCalls(options_.memory_bytes),
                      MaxStreams(options_.memory_bytes), &call_threads_, &stream_threads_});
    absl::StatusOr<std::unique_ptr<Door>> door =
        Door::Open({.flag = "--listen",
                    .address = options_.listen,
                    .credentials = credentials.server,
                    .users = users_.get(),
                    .is_for_others = roles_ != nullptr,
                    .max_connections = MaxConnections(options_),
                    .gate = gate_.get(),
                    .services = {"orlop.v1.Data", "orlop.v1.Job", "orlop.v1.Admin"},
                    .max_message_bytes = static_cast<int>(kMaxMessageBytes)});
    if (!door.ok()) return door.status();
    {
      MutexLock lock(&mutex_);
      address_ = (*door)->address();
      door_ = *std::move(door);
    }
    if (options_.peer_listen.empty()) return absl::OkStatus();
    // A follower passes the calls of its operators on to the step leader's door for peers.
    constexpr Roles kPeers{Role::kPeer};
    peer_gate_ = std::make_unique<Gate>(
        &rpcs_, peer_requests_.get(),
        Gate::Options{kPeers, Identify(), kMaxCalls, 0, &peer_threads_, nullptr});
    door = Door::Open({.flag = "--peer-listen",
                       .address = options_.peer_listen,
                       .credentials = credentials.server,
                       .users = users_.get(),
                       .max_connections = MaxPeerConnections(options_),
                       .gate = peer_gate_.get(),
                       .services = {},
                       .max_message_bytes = static_cast<int>(kMaxPeerMessageBytes)});
    if (!door.ok()) return door.status();
    peer_door_ = *std::move(door);
    return absl::OkStatus();
  }

  v1::ServerInfo ServerIdentity() const {
    MutexLock lock(&mutex_);
    v1::ServerInfo info;
    info.set_name(options_.name);
    info.set_address(options_.peers.size() == 1 ? address_ : options_.self().address);
    info.set_incarnation(data_->incarnation());
    info.set_failure_domain(options_.failure_domain);
    info.set_ready(ready() && !stopped_);
    if (!info.ready()) {
      const std::string awaited = readiness_->awaited();
      info.set_state(stopped_          ? "stopping"
                     : awaited.empty() ? "starting"
                                       : absl::StrCat("starting: ", awaited));
    }
    info.set_leader(options_.peers.front().name == options_.name);
    return info;
  }

  // The body of the ticker_ thread: runs the periodic tasks of all parts.
  void TickLoop() {
    MutexLock lock(&mutex_);
    auto next = std::chrono::steady_clock::now();
    uint64_t message_count = 0;
    int quiet_ticks = 0;
    while (!halting_) {
      next += kTick;
      while (!halting_ && tick_.WaitUntil(&mutex_, next)) {
      }
      mutex_.Unlock();
      LookAtDirectory();
      jobs_->Tick();
      LookAtPeers();
      if (roles_ != nullptr) roles_->Tick();
      job_service_->Tick();
      gate_->Tick();
      if (peer_gate_ != nullptr) peer_gate_->Tick();
      CountStore();
      if (!is_bringing_back_.exchange(true)) {
        pool_->Submit([this] {
          tiers_->BringBack();
          is_bringing_back_ = false;
        });
      }
      // While a job is busy, pages that gRPC and RocksDB have freed stay in the heap, because its
      // next step uses them again. They are returned to the system once no job is busy.
      const uint64_t before = std::exchange(message_count, messages_->message_count());
      quiet_ticks = message_count == before ? quiet_ticks + 1 : 0;
      if (quiet_ticks > 0 && quiet_ticks % kRestTicks == 0) TrimHeap();
      accountant_.accountant->GiveBackIdle();
      mutex_.Lock();
    }
  }

  // Ends the calls and the threads, users before what they use: a call uses jobs, a tick submits
  // tasks to the pool, and a task sends messages through peers_.
  void Halt() {
    if (readiness_ != nullptr) readiness_->End();
    for (Door* door : {door_.get(), peer_door_.get()})
      if (door != nullptr) door->Close();
    {
      MutexLock lock(&mutex_);
      halting_ = true;
      tick_.SignalAll();
    }
    if (ticker_.joinable()) ticker_.join();
    if (pool_ != nullptr) pool_->Stop();
    peers_.reset();
  }

  const Options options_;
  std::unique_ptr<storage::DataDirectory> data_;
  Budget accountant_;
  std::unique_ptr<Tiers> tiers_;
  Mutex store_mutex_;
  Reservation rocksdb_ GUARDED_BY(store_mutex_);
  bool store_fits_ GUARDED_BY(store_mutex_) = true;
  std::unique_ptr<MessageRoom> messages_;
  std::unique_ptr<RequestRoom> requests_, peer_requests_;
  ReadRoom reads_{ReadRoom::BytesFor(options_.memory_bytes)};
  std::unique_ptr<PeerLinks> peers_;
  int next_look_ = 0;                           // of the ticker
  std::atomic<bool> is_bringing_back_ = false;  // a task of the pool does
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<JobTable> jobs_;
  std::unique_ptr<Readiness> readiness_;
  std::unique_ptr<DataService> data_service_;
  std::unique_ptr<JobService> job_service_;
  std::unique_ptr<PeerService> peer_service_;
  std::unique_ptr<AdminService> admin_service_;
  std::unique_ptr<RoleFile> roles_;    // if there is one
  std::unique_ptr<LocalUsers> users_;  // without TLS
  Rpcs rpcs_;
  // Of control calls. Peers have their own, and their own room for requests, so that workers cannot
  // keep a step from them.
  ThreadPool call_threads_{kCallThreads}, peer_threads_{kPeerThreads};
  ThreadPool stream_threads_{StreamThreads()};
  std::unique_ptr<Gate> gate_, peer_gate_;
  std::unique_ptr<Door> door_, peer_door_;  // of workers, and of peers if there are any
  std::atomic<bool> stopped_ = false;
  mutable Mutex mutex_;
  // OpenDoors writes it under mutex_, because calls are already being answered. It does not change
  // after Open, so address() takes no lock.
  std::string address_;
  ServerFacts facts_ GUARDED_BY(mutex_);
  CondVar tick_;  // halting_ was set
  bool halting_ GUARDED_BY(mutex_) = false;
  std::thread ticker_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<OrlopServer>> OrlopServer::Start(
    const Options& options, const std::atomic<bool>* is_ending) {
  auto server = std::make_unique<Running>(options);
  if (absl::Status status = server->Open(is_ending); !status.ok()) return status;
  return std::unique_ptr<OrlopServer>(std::move(server));
}

}  // namespace orlop::server
