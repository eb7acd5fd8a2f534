#include "server/services/data_service.h"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "orlop/v1/data.pb.h"
#include "orlop/v1/types.pb.h"
#include "proto/convert.h"
#include "proto/limits.h"
#include "server/job/job_model.h"
#include "server/job/slots.h"
#include "server/lanes/region.h"
#include "server/runtime/answers.h"
#include "server/runtime/job_table.h"
#include "server/runtime/wait.h"
#include "server/services/gate.h"
#include "server/services/patience.h"
#include "server/services/pull_call.h"
#include "server/services/push_call.h"
#include "server/shards/shard_store.h"
#include "server/step/layout.h"
#include "server/step/messages.h"
#include "server/step/participant.h"

namespace orlop::server {
namespace {

// Sets tensor, shard, slot and box of a stored piece. Returns whether SetState sent the piece.
bool FillRegion(JobRuntime& job, const step::PieceKey& key, v1::Region* out) {
  const std::shared_ptr<const JobModel> model = job.model();
  const uint32_t tensor = static_cast<uint32_t>(model->spec()->shards[key.shard].tensor);
  out->set_tensor(model->tensors()[tensor].name);
  out->set_shard(static_cast<uint64_t>(key.shard - model->FirstShard(tensor)));
  if (auto loads = job.shards().StagedLoads(key.shard); loads.ok()) {
    for (const auto& [slot, box] : *loads) {
      if (step::LoadRegion(SlotName(slot), box) != key.region) continue;
      out->set_slot(SlotName(slot));
      ToWire(box, out->mutable_box());
      return true;
    }
  }
  const std::shared_ptr<const step::Layout> layout = job.layout();
  if (layout == nullptr || key.rank >= layout->world_size()) return false;
  for (const step::Contribution& contribution : layout->by_rank[key.rank]) {
    if (contribution.tensor != static_cast<step::TensorId>(tensor) ||
        key.region >= contribution.boxes.size())
      continue;
    ToWire(contribution.boxes[key.region], out->mutable_box());
  }
  return false;
}

// Fills in the pieces of one page that the rank has pushed.
void FillPieces(JobRuntime& job, const v1::QueryPushRequest& request,
                v1::QueryPushResponse* response) {
  size_t expected = 0;
  const std::vector<step::StagedPiece> pieces = job.PiecesFrom(request.key().rank(), &expected);
  response->set_attempt(static_cast<uint32_t>(job.position().attempt));
  response->set_complete(pieces.size() >= expected);
  for (size_t i = request.after(); i < pieces.size(); ++i) {
    if (response->pieces_size() == static_cast<int>(kMaxPiecesPerPage)) {
      response->set_next(i);
      break;
    }
    v1::StoredPiece* stored = response->add_pieces();
    ToWire(pieces[i].payload, stored->mutable_digest());
    if (FillRegion(job, pieces[i].key, stored->mutable_region()))
      response->set_complete(false);  // pieces of a LOAD may follow until its CommitStep
  }
}

}  // namespace

void DataService::AddTo(Rpcs* rpcs) {
  for (const bool is_load : {false, true}) {
    rpcs->AddStream(is_load ? "/orlop.v1.Data/SetState" : "/orlop.v1.Data/Push",
                    [this, is_load](Gate* gate, grpc::GenericCallbackServerContext* context) {
                      return new PushCall(gate, context, jobs_, messages_, is_load);
                    });
  }
  rpcs->AddStream("/orlop.v1.Data/Pull",
                  [this](Gate* gate, grpc::GenericCallbackServerContext* context) {
                    return new PullCall(gate, context, jobs_, reads_);
                  });
  rpcs->Add("/orlop.v1.Data/QueryPush", this, &DataService::QueryPush);
}

void DataService::QueryPush(Call* call, const v1::QueryPushRequest& request,
                            v1::QueryPushResponse* response) {
  const absl::StatusOr<std::shared_ptr<JobRuntime>> job = jobs_->Find(request.key().job());
  if (!job.ok()) return call->End(job.status());
  Patience::Begin(call->threads(), ForAnAttempt({call->deadline(), nullptr}).deadline,
                  [=, &request, job = *job](const std::shared_ptr<Wakeup>& wakeup, bool is_last) {
                    const step::KeyVerdict verdict = job->CheckKey(KeyOf(request.key()), wakeup);
                    if (verdict.is_later && !is_last) return false;
                    if (verdict.status.ok()) FillPieces(*job, request, response);
                    call->End(WithPosition(verdict.status, job->position(), request.key().job()));
                    return true;
                  });
}

}  // namespace orlop::server
