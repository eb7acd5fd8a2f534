// Tests the client against a server in this process that keeps pushed bytes in a map and fails on
// command.
#include "client/client.h"

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/box.h"
#include "base/checksum.h"
#include "base/mutex.h"
#include "client/lanes/pending_push.h"
#include "client/link/options.h"
#include "client/link/parts.h"
#include "orlop/v1/admin.grpc.pb.h"
#include "orlop/v1/admin.pb.h"
#include "orlop/v1/data.grpc.pb.h"
#include "orlop/v1/data.pb.h"
#include "orlop/v1/job.grpc.pb.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"

namespace orlop::client {
namespace {

using v1::ErrorDetail;

constexpr uint64_t kShardElements = 1 << 20;  // 4 MiB of fp32
constexpr uint64_t kElements = 2 * kShardElements + 1000;

grpc::Status Refuse(absl::StatusCode code, ErrorDetail::Reason reason, uint32_t attempt = 0) {
  ErrorDetail detail;
  detail.set_reason(reason);
  detail.set_attempt(attempt);
  return ToGrpc(MakeError(code, ErrorDetail::Reason_Name(reason), detail));
}

std::string Piece(const v1::Region& region) {
  return region.tensor() + "/" + std::to_string(region.shard());
}

// One server that owns all shards of one tensor "w".
class FakeServer : public v1::Data::Service, public v1::Job::Service, public v1::Admin::Service {
 public:
  // The faults of the next streams, in order.
  enum class Fault {
    kNone,
    kBreakAfterFirstPiece,
    kChecksum,
    kStaleEpoch,
    kStaleAttempt,
    kDamagePull,
    // Pull answers that the version was applied over, and a later step is committed.
    kVersionGone,
    kHang
  };

  explicit FakeServer(std::string address) : address_(std::move(address)) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort(address_, grpc::InsecureServerCredentials());
    builder.RegisterService(static_cast<v1::Data::Service*>(this));
    builder.RegisterService(static_cast<v1::Job::Service*>(this));
    builder.RegisterService(static_cast<v1::Admin::Service*>(this));
    builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
    server_ = builder.BuildAndStart();
  }
  ~FakeServer() override { Stop(); }
  void Stop() {
    {
      MutexLock lock(&mutex_);
      stopped_ = true;
      changed_.SignalAll();
    }
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
    server_.reset();
  }

  void Plan(std::vector<Fault> faults) {
    MutexLock lock(&mutex_);
    faults_ = std::move(faults);
  }
  std::map<std::string, std::string> pieces() {
    MutexLock lock(&mutex_);
    return pieces_;
  }
  int received_pieces() {
    MutexLock lock(&mutex_);
    return received_pieces_;
  }
  int64_t committed_step() {
    MutexLock lock(&mutex_);
    return committed_step_;
  }
  uint64_t epoch() {
    MutexLock lock(&mutex_);
    return epoch_;
  }

  grpc::Status Push(grpc::ServerContext* context, grpc::ServerReader<v1::Chunk>* reader,
                    v1::PushResponse* response) override {
    const Fault fault = NextFault();
    if (fault == Fault::kStaleAttempt)
      return Refuse(absl::StatusCode::kAborted, ErrorDetail::STALE_ATTEMPT, 9);
    if (fault == Fault::kStaleEpoch) {
      MutexLock lock(&mutex_);
      ++epoch_;
    }
    if (fault == Fault::kHang) WaitForStop();
    v1::Chunk chunk;
    std::string bytes, name;
    PieceDigest digest;
    while (reader->Read(&chunk)) {
      if (chunk.has_key() && chunk.key().epoch() < epoch())
        return Refuse(absl::StatusCode::kFailedPrecondition, ErrorDetail::STALE_EPOCH);
      if (chunk.has_region())
        name = Piece(chunk.region()), bytes.clear(), digest = PieceDigest(),
        region_ = chunk.region();
      const std::vector<uint64_t> leaves = LeafHashes(chunk.payload());
      if (chunk.offset_bytes() != bytes.size())
        return Refuse(absl::StatusCode::kInvalidArgument, ErrorDetail::BAD_REQUEST);
      if (ChunkChecksum(leaves) != chunk.checksum() || fault == Fault::kChecksum)
        return Refuse(absl::StatusCode::kAborted, ErrorDetail::CHECKSUM);
      digest.AddLeaves(leaves);
      bytes += chunk.payload();
      if (!chunk.has_piece_digest()) continue;
      const Digest128 sum = digest.Finish();
      if (sum.high != chunk.piece_digest().high() || sum.low != chunk.piece_digest().low())
        return Refuse(absl::StatusCode::kAborted, ErrorDetail::CHECKSUM);
      Store(name, bytes, region_, chunk.piece_digest());
      response->set_piece_count(response->piece_count() + 1);
      if (fault == Fault::kBreakAfterFirstPiece)
        return grpc::Status(grpc::StatusCode::UNAVAILABLE, "planned break");
    }
    return grpc::Status::OK;
  }

  grpc::Status QueryPush(grpc::ServerContext*, const v1::QueryPushRequest*,
                         v1::QueryPushResponse* response) override {
    MutexLock lock(&mutex_);
    for (const auto& piece : stored_) *response->add_pieces() = piece;
    return grpc::Status::OK;
  }

  grpc::Status Pull(grpc::ServerContext*, const v1::PullRequest* request,
                    grpc::ServerWriter<v1::Chunk>* writer) override {
    const Fault fault = NextFault();
    if (fault == Fault::kVersionGone) {
      MutexLock lock(&mutex_);
      ++committed_step_;
    }
    if (!request->has_version() || request->version() != committed_step())
      return Refuse(absl::StatusCode::kOutOfRange, ErrorDetail::VERSION_GONE);
    bool first = true;
    for (const v1::Region& region : request->regions()) {
      const std::string bytes = pieces()[Piece(region)];
      PieceDigest digest;
      for (size_t offset = 0; offset < bytes.size(); offset += request->max_chunk_bytes()) {
        v1::Chunk chunk;
        if (first) chunk.mutable_key()->set_step(request->version());
        if (offset == 0) *chunk.mutable_region() = region;
        first = false;
        chunk.set_offset_bytes(offset);
        chunk.set_payload(bytes.substr(offset, request->max_chunk_bytes()));
        const std::vector<uint64_t> leaves = LeafHashes(chunk.payload());
        chunk.set_checksum(ChunkChecksum(leaves));
        digest.AddLeaves(leaves);
        if (offset + chunk.payload().size() == bytes.size()) {
          chunk.mutable_piece_digest()->set_high(digest.Finish().high);
          chunk.mutable_piece_digest()->set_low(digest.Finish().low);
        }
        if (fault == Fault::kDamagePull)
          (*chunk.mutable_payload())[chunk.payload().size() / 2] ^= 1;
        if (!writer->Write(chunk)) return grpc::Status::CANCELLED;
      }
    }
    return grpc::Status::OK;
  }

  grpc::Status GetManifest(grpc::ServerContext*, const v1::GetManifestRequest*,
                           v1::GetManifestResponse* response) override {
    v1::TensorSpec* tensor = response->add_tensors();
    tensor->set_name("w");
    tensor->add_shape(kElements);
    tensor->set_dtype(v1::DTYPE_F32);
    response->set_shard_elements(kShardElements);
    return grpc::Status::OK;
  }
  grpc::Status GetPlacement(grpc::ServerContext*, const v1::GetPlacementRequest*,
                            v1::GetPlacementResponse* response) override {
    v1::PlacementMap* map = response->mutable_placement();
    map->set_epoch(epoch());
    *map->add_servers() = Self();
    v1::PlacementRun* run = map->add_runs();
    run->set_shard_count(3);
    run->add_servers(0);
    return grpc::Status::OK;
  }
  grpc::Status JobStatus(grpc::ServerContext*, const v1::JobStatusRequest* request,
                         v1::JobStatusResponse* response) override {
    if (request->job() == "nobody")
      return Refuse(absl::StatusCode::kNotFound, ErrorDetail::UNKNOWN_JOB);
    response->set_committed_step(committed_step());
    return grpc::Status::OK;
  }
  grpc::Status ListServers(grpc::ServerContext*, const v1::ListServersRequest*,
                           v1::ListServersResponse* response) override {
    *response->mutable_placement()->add_servers() = Self();
    return grpc::Status::OK;
  }

 private:
  v1::ServerInfo Self() {
    v1::ServerInfo info;
    info.set_name("one");
    info.set_address(address_);
    info.set_ready(true);
    info.set_leader(true);
    return info;
  }
  void WaitForStop() {
    MutexLock lock(&mutex_);
    while (!stopped_) changed_.Wait(&mutex_);
  }
  Fault NextFault() {
    MutexLock lock(&mutex_);
    if (faults_.empty()) return Fault::kNone;
    const Fault fault = faults_.front();
    faults_.erase(faults_.begin());
    return fault;
  }
  void Store(const std::string& name, const std::string& bytes, const v1::Region& region,
             const v1::Digest& digest) {
    MutexLock lock(&mutex_);
    pieces_[name] = bytes;
    ++received_pieces_;
    *stored_.emplace_back().mutable_region() = region;
    *stored_.back().mutable_digest() = digest;
  }

  const std::string address_;
  std::unique_ptr<grpc::Server> server_;
  v1::Region region_;  // tests use one connection
  Mutex mutex_;
  CondVar changed_;
  std::vector<Fault> faults_ GUARDED_BY(mutex_);
  std::map<std::string, std::string> pieces_ GUARDED_BY(mutex_);
  std::vector<v1::StoredPiece> stored_ GUARDED_BY(mutex_);
  int received_pieces_ GUARDED_BY(mutex_) = 0;
  uint64_t epoch_ GUARDED_BY(mutex_) = 1;
  int64_t committed_step_ GUARDED_BY(mutex_) = 4;
  bool stopped_ GUARDED_BY(mutex_) = false;
};

using Fault = FakeServer::Fault;

class ClientTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "/clientXXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
    address_ = "unix:" + directory_ + "/socket";
    server_ = std::make_unique<FakeServer>(address_);
    Open({.server = address_, .connections_per_server = 1});
    data_.resize(kElements);
    for (size_t i = 0; i < data_.size(); ++i) data_[i] = static_cast<uint32_t>(i * 2654435761u);
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  void Open(ClientOptions options) {
    options.retry = {.first_backoff = Milliseconds(1),
                     .longest_backoff = Milliseconds(5),
                     .budget = 20,
                     .budget_per_second = 0};
    auto client = Client::Connect(options);
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
    auto session = client_->AttachJob("job");
    ASSERT_TRUE(session.ok()) << session.status();
    session_ = *std::move(session);
  }
  PushPart Part() {
    return {
        .tensor = 0,
        .data = absl::MakeConstSpan(reinterpret_cast<std::byte*>(data_.data()), data_.size() * 4)};
  }
  absl::StatusOr<Transfer> Push(const PushOptions& options = {}) {
    const PushPart part = Part();
    return session_->Push({&part, 1}, options);
  }
  std::string Stored() {
    std::string all;
    for (const auto& [name, bytes] : server_->pieces()) all += bytes;
    return all;
  }
  std::string Sent() const {
    return {reinterpret_cast<const char*>(data_.data()), data_.size() * 4};
  }

  std::string directory_, address_;
  std::unique_ptr<FakeServer> server_;
  std::unique_ptr<Client> client_;
  std::unique_ptr<Session> session_;
  std::vector<uint32_t> data_;
};

TEST_F(ClientTest, PushesEveryShardAndPullsTheSameBytes) {
  const auto pushed = Push();
  ASSERT_TRUE(pushed.ok()) << pushed.status();
  EXPECT_EQ(pushed->pieces, 3u);
  EXPECT_EQ(pushed->bytes, kElements * 4);
  EXPECT_EQ(pushed->version, 5);  // the step after the committed one
  EXPECT_EQ(Stored(), Sent());
  std::vector<uint32_t> back(kElements);
  const PullPart part{
      .tensor = 0,
      .data = absl::MakeSpan(reinterpret_cast<std::byte*>(back.data()), kElements * 4)};
  const auto pulled = session_->Pull({&part, 1}, {.version = 4});
  ASSERT_TRUE(pulled.ok()) << pulled.status();
  EXPECT_EQ(pulled->version, 4);
  EXPECT_EQ(back, data_);
  EXPECT_EQ(session_->timings().push_bytes, kElements * 4);
  EXPECT_EQ(session_->TakeTimings().pull_bytes, kElements * 4);
  EXPECT_EQ(session_->timings().pull_calls, 0u);
}

TEST_F(ClientTest, BrokenPushGoesOnWithWhatIsMissing) {
  server_->Plan({Fault::kBreakAfterFirstPiece});
  const auto pushed = Push();
  ASSERT_TRUE(pushed.ok()) << pushed.status();
  EXPECT_EQ(Stored(), Sent());
  EXPECT_EQ(server_->received_pieces(), 3);  // QueryPush reported that the server had the first
}

TEST_F(ClientTest, ChecksumRefusedByTheServerIsSentAgain) {
  server_->Plan({Fault::kChecksum});
  ASSERT_TRUE(Push().ok());
  EXPECT_EQ(Stored(), Sent());
}

TEST_F(ClientTest, DamagedPullIsFetchedAgain) {
  ASSERT_TRUE(Push().ok());
  server_->Plan({Fault::kDamagePull});
  std::vector<uint32_t> back(kElements);
  const PullPart part{
      .tensor = 0,
      .data = absl::MakeSpan(reinterpret_cast<std::byte*>(back.data()), kElements * 4)};
  ASSERT_TRUE(session_->Pull({&part, 1}).ok());
  EXPECT_EQ(back, data_);
}

TEST_F(ClientTest, LatestIsTheCommittedStepByNumberWhateverIsAppliedMeanwhile) {
  ASSERT_TRUE(Push().ok());
  std::vector<uint32_t> back(kElements);
  const PullPart part{
      .tensor = 0,
      .data = absl::MakeSpan(reinterpret_cast<std::byte*>(back.data()), kElements * 4)};
  server_->Plan(std::vector<Fault>(6, Fault::kVersionGone));
  const auto pulled = session_->Pull({&part, 1}, {.latest = true});
  ASSERT_TRUE(pulled.ok()) << pulled.status();
  EXPECT_EQ(pulled->version, 10);
  EXPECT_EQ(back, data_);
  server_->Plan(std::vector<Fault>(100, Fault::kVersionGone));
  const absl::Status given_up = session_->Pull({&part, 1}, {.latest = true}).status();
  EXPECT_EQ(DetailOf(given_up).reason(), ErrorDetail::VERSION_GONE) << given_up;
}

TEST_F(ClientTest, PullDamagedEveryTimeIsGivenUpNamingServerAndTensor) {
  ASSERT_TRUE(Push().ok());
  server_->Plan(std::vector<Fault>(100, Fault::kDamagePull));
  std::vector<uint32_t> back(kElements);
  const PullPart part{
      .tensor = 0,
      .data = absl::MakeSpan(reinterpret_cast<std::byte*>(back.data()), kElements * 4)};
  const auto pulled = session_->Pull({&part, 1});
  ASSERT_EQ(pulled.status().code(), absl::StatusCode::kAborted);
  EXPECT_EQ(DetailOf(pulled.status()).reason(), ErrorDetail::CHECKSUM);
  EXPECT_EQ(DetailOf(pulled.status()).tensor(), "w");
  EXPECT_NE(pulled.status().message().find("server one, tensor w"), absl::string_view::npos)
      << pulled.status();
}

TEST_F(ClientTest, StaleEpochRefreshesThePlacement) {
  server_->Plan({Fault::kStaleEpoch});
  ASSERT_TRUE(Push().ok());
  EXPECT_EQ(session_->state().epoch, server_->epoch());
  EXPECT_EQ(session_->placement().epoch(), 2u);
}

TEST_F(ClientTest, StaleAttemptIsToldToTheCallerAndLearned) {
  server_->Plan({Fault::kStaleAttempt});
  const auto pushed = Push();
  ASSERT_EQ(pushed.status().code(), absl::StatusCode::kAborted);
  EXPECT_EQ(DetailOf(pushed.status()).reason(), ErrorDetail::STALE_ATTEMPT);
  EXPECT_EQ(session_->state().attempt, 9u);
}

TEST_F(ClientTest, DeadlineNamesServerAndTensor) {
  server_->Plan({Fault::kHang});
  const auto pushed = Push({.timeout = Milliseconds(100)});
  ASSERT_FALSE(pushed.ok());
  EXPECT_EQ(DetailOf(pushed.status()).server(), "one");
  EXPECT_EQ(DetailOf(pushed.status()).tensor(), "w");
}

TEST_F(ClientTest, DeadServerIsGivenUpNamingServerAndTensor) {
  server_->Stop();
  const auto pushed = Push({.timeout = Milliseconds(2000)});
  ASSERT_FALSE(pushed.ok());
  EXPECT_EQ(DetailOf(pushed.status()).server(), "one");
  EXPECT_EQ(DetailOf(pushed.status()).tensor(), "w");
  EXPECT_GT(session_->timings().retries, 0u);
}

TEST_F(ClientTest, PushesUnderWayShareStreamsAndAllComplete) {
  std::vector<std::unique_ptr<PendingPush>> pending;
  std::vector<Box> boxes = {{{0}, {kShardElements}, true},
                            {{kShardElements}, {kShardElements}, true},
                            {{2 * kShardElements}, {1000}, true}};
  for (const Box& box : boxes) {
    PushPart part = Part();
    part.box = box;
    part.data = part.data.subspan(box.offset[0] * 4, box.extent[0] * 4);
    auto started = session_->PushAsync({&part, 1});
    ASSERT_TRUE(started.ok()) << started.status();
    pending.push_back(*std::move(started));
  }
  for (const auto& push : pending) EXPECT_TRUE(push->Wait().ok());
  EXPECT_EQ(Stored(), Sent());
}

TEST_F(ClientTest, ErrorsOfTheCallerAreFoundBeforeAnythingIsSent) {
  PushPart part = Part();
  part.data = part.data.subspan(4);
  EXPECT_EQ(session_->Push({&part, 1}).status().code(), absl::StatusCode::kInvalidArgument);
  part.tensor = 7;
  EXPECT_EQ(session_->PushAsync({&part, 1}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(server_->received_pieces(), 0);
  EXPECT_EQ(client_->AttachJob("nobody").status().code(), absl::StatusCode::kNotFound);
}

TEST(Connect, NamesTheAddressOrTheOptionAtFault) {
  const auto nobody =
      Client::Connect({.server = "unix:/nonexistent/socket", .connect_timeout = Milliseconds(50)});
  ASSERT_FALSE(nobody.ok());
  EXPECT_NE(nobody.status().message().find("unix:/nonexistent/socket"), absl::string_view::npos)
      << nobody.status();
  EXPECT_EQ(Client::Connect({.connections_per_server = 0}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Client::Connect({.chunk_bytes = 5 << 20}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Client::Connect({.tls = {.certificate = "/nonexistent"}}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace orlop::client
