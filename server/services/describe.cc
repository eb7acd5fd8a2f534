#include "server/services/describe.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "orlop/v1/admin.pb.h"
#include "proto/limits.h"
#include "server/job/job_model.h"
#include "server/job/optimizer_config.h"
#include "server/job/slots.h"
#include "server/memory/accountant.h"
#include "server/runtime/job_table.h"
#include "server/shards/shard_store.h"

namespace orlop::server {
namespace {

uint64_t RestBytes(const Tensor& tensor, const TensorOptimizer& optimizer) {
  uint64_t bytes = 0;
  for (size_t slot = 0; slot < kStoredSlotCount; ++slot) {
    const SlotFormat format =
        FormatOf(tensor, optimizer, static_cast<Slot>(slot), {0, tensor.element_count});
    if (format.exists()) bytes += format.Bytes(tensor.element_count);
  }
  return bytes;
}

}  // namespace

v1::TensorSummary Summary(JobRuntime* job, const JobModel& model,
                          const std::vector<TensorOptimizer>& optimizers, uint32_t t) {
  v1::TensorSummary out;
  out.set_index(t);
  *out.mutable_spec() = model.definition().manifest().tensors(static_cast<int>(t));
  out.set_element_count(model.tensors()[t].element_count);
  out.set_shard_count(model.ShardCountOf(t));
  out.set_rest_bytes(RestBytes(model.tensors()[t], optimizers[t]));
  out.set_applied_count(static_cast<uint64_t>(std::max<int64_t>(0, job->AppliedCount(t))));
  if (optimizers[t].frozen()) return out;
  out.set_optimizer(optimizers[t].optimizer->name);
  out.set_state(StateName(optimizers[t].state));
  out.set_group(static_cast<uint32_t>(model.GroupOf(t)));
  return out;
}

absl::StatusOr<v1::DescribeTensorResponse> DescribeHere(const JobTable& jobs,
                                                        const v1::DescribeTensorRequest& request) {
  absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs.Find(request.job());
  if (!job.ok()) return job.status();
  const std::shared_ptr<const JobModel> model = (*job)->model();
  absl::StatusOr<uint32_t> tensor = model->FindTensor(request.tensor());
  if (!tensor.ok()) return tensor.status();
  v1::DescribeTensorResponse response;
  const uint64_t end =
      std::min<uint64_t>(model->ShardCountOf(*tensor), request.first_shard() + kMaxShardsPerPage);
  for (uint64_t s = request.first_shard(); s < end; ++s) {
    const int32_t id = model->FirstShard(*tensor) + static_cast<int32_t>(s);
    if (model->Owner(id) != jobs.environment().self) continue;
    absl::StatusOr<ShardStatus> status = (*job)->shards().Describe(id);
    if (!status.ok()) return status.status();
    v1::ShardDescription* out = response.add_shards();
    out->set_shard(s);
    out->set_first_element(status->shard.range.begin);
    out->set_element_count(status->shard.range.count());
    out->add_copies(jobs.environment().server_names[jobs.environment().self]);
    out->set_version(status->version);
    out->set_reason(model->ReasonOf(id));
    out->set_stage(status->stage);
    for (const SlotStatus& slot : status->slots) {
      v1::SlotBytes* bytes = out->add_slots();
      bytes->set_slot(SlotName(slot.slot));
      bytes->set_dtype(slot.dtype);
      bytes->set_tier(TierName(slot.tier));
      bytes->set_bytes(slot.bytes);
    }
  }
  return response;
}

}  // namespace orlop::server
