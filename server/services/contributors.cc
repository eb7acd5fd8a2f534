#include "server/services/contributors.h"

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"
#include "proto/status.h"

namespace orlop::server {
namespace {

constexpr size_t kGenerations = 2;  // the one that contributes, and the one that is forming

}  // namespace

void Contributors::Joined(const std::string& job, uint64_t generation, uint32_t rank,
                          const std::string& caller) {
  MutexLock lock(&mutex_);
  auto& generations = jobs_[job];
  generations[generation].emplace(rank, caller);
  while (generations.size() > kGenerations) generations.erase(generations.begin());
}

absl::Status Contributors::Check(const std::string& job, uint64_t generation, uint32_t rank,
                                 const std::string& caller) const {
  MutexLock lock(&mutex_);
  const auto generations = jobs_.find(job);
  if (generations == jobs_.end()) return absl::OkStatus();
  const auto ranks = generations->second.find(generation);
  if (ranks == generations->second.end()) return absl::OkStatus();
  const auto owner = ranks->second.find(rank);
  if (owner == ranks->second.end() || owner->second == caller) return absl::OkStatus();
  v1::ErrorDetail detail;
  detail.set_reason(v1::ErrorDetail::DENIED);
  detail.set_job(job);
  detail.set_field("rank");
  detail.set_actual(absl::StrCat(rank));
  return MakeError(
      absl::StatusCode::kPermissionDenied,
      absl::StrCat("rank ", rank, " of generation ", generation, " of job '", job, "' is of ",
                   Beginning(owner->second, kMaxNameBytes), ", and this caller is ",
                   Beginning(caller, kMaxNameBytes), ": join a new generation"),
      detail);
}

void Contributors::Forget(const std::string& job) {
  MutexLock lock(&mutex_);
  jobs_.erase(job);
}

}  // namespace orlop::server
