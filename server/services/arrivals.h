// The calls that gRPC has begun, counted before its gate sees them, until their memory is freed.
//
// gRPC begins a call for each header that it reads, as fast as it can read, and calls go to the
// gate and end as fast as they are handled: so those that their client has cancelled, or that the
// gate has refused, pile up without limit. Each call is therefore counted when gRPC asks whether
// the caller is known, which it does while it reads; one that is too many ends there, and costs
// little. A client that goes on all the same is cut off, because gRPC would read nothing else
// meanwhile.
#pragma once

#include <grpcpp/security/auth_context.h>

#include <array>
#include <atomic>
#include <functional>
#include <string_view>
#include <utility>

namespace orlop::server {

// Connections of a door are counted by lane: the acceptor that was given them.
inline constexpr int kMaxLanes = 128;

class Arrivals {
 public:
  // At most `most` calls of Orlop's services exist at a time, and `share` of them on one lane.
  Arrivals(int most, int share) : most_(most), share_(share) {}

  // `cut` closes the connections of a lane. Begin calls it when more than an eighth of a
  // share of calls were too many since the last tick. Set it before calls begin.
  void SetOnFlood(std::function<void(int lane)> cut) { cut_ = std::move(cut); }

  // Marks a connection as of a lane, at its first call.
  //   Threads  any; likewise all but Tick
  static void Mark(int lane, grpc::AuthContext* connection);
  static int LaneOf(const grpc::AuthContext& connection);

  // A call begins. False: it is one too many, and must be refused.
  bool Begin(std::string_view method, int lane);
  // A call has come to the gate; it has ended. One that was cancelled counts until the second tick
  // from then: gRPC frees it later, and a client can cancel faster than gRPC frees.
  void Arrived(std::string_view method, int lane);
  void Ended(std::string_view method, int lane, bool was_cancelled);
  // The server's ticker calls it.
  void Tick();

 private:
  static constexpr int kOthersPerTick = 256;
  static constexpr int kPatience = 8;

  struct Calls {
    std::atomic<int> under_way = 0;  // to the gate
    std::atomic<int> fewest = 0;     // that were under way since the last tick
    std::atomic<int> there = 0;
    std::atomic<int> refused = 0;    // since the last tick
    int fewest_before = 0;           // in the tick before
    std::atomic<int> cancelled = 0;  // since the last tick, and still of `there`
    int cancelled_before = 0;

    bool Begin(int most);
    void Arrive();
    void End(bool was_cancelled);
    void GiveUp();
    void Tick();
  };

  const int most_, share_;
  std::function<void(int)> cut_;
  Calls all_;
  std::array<Calls, kMaxLanes> of_;
  // Calls of other services, which gRPC answers itself (health, reflection) or nobody does, have a
  // share that each tick renews.
  std::atomic<int> others_left_ = kOthersPerTick;
};

}  // namespace orlop::server
