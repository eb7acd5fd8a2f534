// The state behind a Session: what the control calls update and the data calls read.
#pragma once

#include <memory>
#include <string>

#include "client/lanes/push_queue.h"
#include "client/session.h"
#include "orlop/v1/job.grpc.pb.h"

namespace orlop::client {

class Session::Core {
 public:
  Core(std::shared_ptr<Link> link, std::string job, Manifest manifest, bool existed);
  ~Core();

  // A control call about this job, to the step leader.
  template <typename Request, typename Response>
  absl::StatusOr<Response> CallLeader(Rpc rpc,
                                      grpc::Status (v1::Job::StubInterface::*method)(
                                          grpc::ClientContext*, const Request&, Response*),
                                      const Request& request,
                                      std::optional<Milliseconds> timeout = {}) {
    return link->Call<v1::Job>(rpc, Link::kLeader, subject, method, request, timeout);
  }

  StepState state() const;
  std::shared_ptr<const Placement> placement() const;
  Timings timings(bool reset);

  absl::Status RefreshPlacement();
  absl::Status RefreshState();  // committed step, attempt, epoch
  // `first_page` has its runs up to `next`; the rest is fetched. `next` 0: it is whole.
  absl::Status AdoptPlacement(v1::PlacementMap first_page, uint64_t next);
  void AdoptCommit(const v1::CommitStepResponse& response);
  void AdoptJoin(const v1::JoinResponse& response, uint32_t rank);
  // After an error: STALE_ATTEMPT tells the attempt that is open.
  void LearnFrom(const absl::Status& status);
  void AddPush(const absl::StatusOr<Transfer>& outcome, double seconds);
  void AddPull(const absl::StatusOr<Transfer>& outcome, double seconds);
  void AddCommit(double seconds);
  void SetAttempt(uint32_t attempt);

  DataDoor door();
  PushEngine* pushes() { return pushes_.get(); }

  const std::shared_ptr<Link> link;
  const std::string job;
  const std::string subject;  // "job NAME", for messages
  const Manifest manifest;
  const bool existed;
  const std::string client_id;  // random: tells a repeat from a second contributor of the same rank

 private:
  CancelSet cancels_;
  mutable Mutex mutex_;
  StepState state_ GUARDED_BY(mutex_);
  std::shared_ptr<const Placement> placement_ GUARDED_BY(mutex_);
  Timings timings_ GUARDED_BY(mutex_);
  uint64_t retries_before_ GUARDED_BY(mutex_) = 0;  // of the link, when timings_ was last reset
  std::unique_ptr<PushEngine> pushes_;              // last: its thread uses all the others
};

}  // namespace orlop::client
