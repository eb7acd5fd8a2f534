// A job for benches: bf16 tensors of one size on private servers, loaded and joined by one worker.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "bench/processes.h"
#include "client/client.h"

namespace orlop::bench {

class BenchJob {
 public:
  static constexpr char kName[] = "bench";
  static constexpr uint64_t kTensorElements = uint64_t{1} << 22;

  // Creates the job with AdamW and 8-bit state and loads its weights as step 0. `bytes` of bf16,
  // rounded up to whole tensors. `memory` and `data_dir`: as PrivateServers::Start.
  static absl::StatusOr<std::unique_ptr<BenchJob>> Create(int servers, uint64_t bytes,
                                                          const std::string& memory,
                                                          const std::string& data_dir);

  // Pushes all gradients of the open attempt.
  absl::Status Push();
  // Pulls all weights of the committed step.
  absl::Status Pull();
  // Commits the step. Returns DataLoss if the servers skipped it.
  absl::Status Commit();

  client::Session* session() { return session_.get(); }
  client::Client* client() { return client_.get(); }
  double ServersCpuSeconds() const { return servers_->CpuSeconds(); }
  // Returns the directory that has the servers' data directories.
  const std::string& servers_directory() const { return servers_->directory(); }
  absl::Span<char> pushed() { return absl::MakeSpan(gradients_); }
  absl::Span<char> pulled() { return absl::MakeSpan(weights_); }
  uint64_t bytes() const { return gradients_.size(); }

 private:
  BenchJob() = default;
  absl::Status Configure();
  std::vector<client::PushPart> PushParts(const std::vector<char>& from) const;

  std::unique_ptr<PrivateServers> servers_;
  std::unique_ptr<client::Client> client_;
  std::unique_ptr<client::Session> session_;
  std::vector<char> gradients_, weights_;
  std::vector<client::PullPart> pulls_;
};

}  // namespace orlop::bench
