// The state behind a Session: control calls update it, data calls read it.
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

  // Makes a control call about this job to the step leader.
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
  // Reads committed step, attempt and epoch from the step leader.
  absl::Status RefreshState();
  // `first_page` has the runs before `next`; this fetches the others. `next` 0: the page has all.
  absl::Status AdoptPlacement(v1::PlacementMap first_page, uint64_t next);
  void AdoptCommit(const v1::CommitStepResponse& response);
  void AdoptJoin(const v1::JoinResponse& response, uint32_t rank);
  // Adopts the open attempt that a STALE_ATTEMPT error names. Other statuses change nothing.
  void LearnFrom(const absl::Status& status);
  void AddPush(const absl::StatusOr<Transfer>& outcome, double seconds);
  void AddPull(const absl::StatusOr<Transfer>& outcome, double seconds);
  void AddCommit(double seconds);
  void SetAttempt(uint32_t attempt);

  DataDoor door();
  PushEngine* pushes() { return pushes_.get(); }

  const std::shared_ptr<Link> link;
  const std::string job;
  // "job NAME", for messages.
  const std::string subject;
  const Manifest manifest;
  const bool existed;
  // Random. It lets the server tell a repeated Join from a second contributor with the same rank.
  const std::string client_id;

 private:
  CancelSet cancels_;
  mutable Mutex mutex_;
  StepState state_ GUARDED_BY(mutex_);
  std::shared_ptr<const Placement> placement_ GUARDED_BY(mutex_);
  Timings timings_ GUARDED_BY(mutex_);
  // Retries of the link when timings_ was last reset.
  uint64_t retries_before_ GUARDED_BY(mutex_) = 0;
  // Declared last, because its thread uses all other members.
  std::unique_ptr<PushEngine> pushes_;
};

}  // namespace orlop::client
