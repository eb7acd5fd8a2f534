#include "server/services/arrivals.h"

#include <grpcpp/security/auth_context.h>

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/mutex.h"

namespace orlop::server {
namespace {

constexpr char kLane[] = "orlop_lane";  // the property of a connection

bool IsOrlop(std::string_view method) { return method.starts_with("/orlop.v1."); }

}  // namespace

void Arrivals::Mark(int lane, grpc::AuthContext* connection) {
  static Mutex mutex;  // two calls may be the first
  MutexLock lock(&mutex);
  if (connection->FindPropertyValues(kLane).empty())
    connection->AddProperty(kLane, absl::StrCat(lane));
}

int Arrivals::LaneOf(const grpc::AuthContext& connection) {
  const std::vector<grpc::string_ref> found = connection.FindPropertyValues(kLane);
  int lane = 0;
  if (found.empty() ||
      !absl::SimpleAtoi(absl::string_view(found[0].data(), found[0].size()), &lane))
    return 0;
  return lane;
}

bool Arrivals::Calls::Begin(int most) {
  if (under_way.fetch_add(1) + there < most) return true;
  GiveUp();
  return false;
}

void Arrivals::Calls::GiveUp() {
  // Tick may have given up on it before.
  for (int count = under_way; count > 0;)
    if (under_way.compare_exchange_weak(count, count - 1)) break;
}

void Arrivals::Calls::Arrive() {
  ++arrived;
  ++there;
  GiveUp();
}

// A call that is cancelled while it begins never arrives. If none has arrived since the last tick,
// those that are still counted are such calls.
void Arrivals::Calls::Tick() {
  const uint64_t now = arrived;
  if (now == arrived_before) under_way = 0;
  arrived_before = now;
  refused = 0;
}

bool Arrivals::Begin(std::string_view method, int lane) {
  bool begins = false;
  Calls& calls = of_[lane];
  if (!IsOrlop(method)) {
    begins = others_left_.fetch_sub(1) > 0;
  } else if (calls.Begin(share_)) {
    begins = all_.Begin(most_);
    if (!begins) calls.GiveUp();
  }
  if (!begins && calls.refused.fetch_add(1) == share_ / kPatience && cut_) cut_(lane);
  return begins;
}

void Arrivals::Arrived(std::string_view method, int lane) {
  if (!IsOrlop(method)) return;
  all_.Arrive();
  of_[lane].Arrive();
}

void Arrivals::Ended(std::string_view method, int lane) {
  if (!IsOrlop(method)) return;
  --all_.there;
  --of_[lane].there;
}

void Arrivals::Tick() {
  others_left_ = kOthersPerTick;
  all_.Tick();
  for (Calls& calls : of_) calls.Tick();
}

}  // namespace orlop::server
