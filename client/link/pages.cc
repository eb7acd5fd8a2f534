#include "client/link/pages.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "client/link/link.h"
#include "client/link/manifest.h"
#include "client/link/retry.h"
#include "orlop/v1/job.grpc.pb.h"
#include "orlop/v1/job.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/limits.h"

namespace orlop::client {
namespace {

// Bytes of list items per page; leaves 1 MiB for the other fields.
constexpr size_t kPageBytes = kMaxControlMessageBytes - (1 << 20);

}  // namespace

std::vector<v1::CreateJobRequest> CreatePages(const JobSpec& spec) {
  v1::CreateJobRequest base;
  base.set_job(spec.job);
  base.set_shard_elements(spec.shard_elements);
  base.set_seed(spec.seed);
  base.set_durability(spec.durability);
  base.set_allow_degraded(spec.allow_degraded);
  std::vector<v1::CreateJobRequest> pages = {base};
  size_t bytes = 0;
  uint64_t index = 0;
  for (const v1::TensorSpec& tensor : spec.tensors) {
    bytes += tensor.ByteSizeLong() + 8;
    if (bytes > kPageBytes && pages.back().tensors_size() > 0) {
      pages.back().set_more(true);
      pages.push_back(base);
      pages.back().set_first(index);
      bytes = tensor.ByteSizeLong() + 8;
    }
    *pages.back().add_tensors() = tensor;
    ++index;
  }
  return pages;
}

std::vector<v1::JoinRequest> JoinPages(const v1::JoinRequest& base,
                                       const v1::ContributionLayout& layout) {
  v1::JoinRequest empty = base;
  *empty.mutable_layout() = layout;
  empty.mutable_layout()->clear_tensors();
  std::vector<v1::JoinRequest> pages = {empty};
  size_t bytes = 0;
  uint64_t index = 0;
  for (const v1::TensorBoxes& boxes : layout.tensors()) {
    bytes += boxes.ByteSizeLong() + 8;
    if (bytes > kPageBytes && pages.back().layout().tensors_size() > 0) {
      pages.back().mutable_layout()->set_more(true);
      pages.push_back(empty);
      pages.back().mutable_layout()->set_first(index);
      bytes = boxes.ByteSizeLong() + 8;
    }
    *pages.back().mutable_layout()->add_tensors() = boxes;
    ++index;
  }
  return pages;
}

absl::StatusOr<Manifest> ReadManifest(Link* link, std::string_view job) {
  v1::GetManifestRequest request;
  request.set_job(std::string(job));
  std::vector<v1::TensorSpec> tensors;
  while (true) {
    absl::StatusOr<v1::GetManifestResponse> page =
        link->Call<v1::Job>(Rpc::kRead, Link::kLeader, absl::StrCat("job ", request.job()),
                            &v1::Job::StubInterface::GetManifest, request);
    if (!page.ok()) return page.status();
    for (v1::TensorSpec& tensor : *page->mutable_tensors()) tensors.push_back(std::move(tensor));
    request.set_first(page->next());
    if (page->next() == 0)
      return Manifest::Build(std::move(tensors), page->shard_elements(), page->seed(),
                             page->durability());
  }
}

}  // namespace orlop::client
