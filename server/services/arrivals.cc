#include "server/services/arrivals.h"

#include <grpcpp/security/auth_context.h>

#include <algorithm>
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
  int count = under_way;
  do {
    if (count <= 0) return;  // Tick has given up on it before
  } while (!under_way.compare_exchange_weak(count, count - 1));
  int least = fewest;
  while (count - 1 < least && !fewest.compare_exchange_weak(least, count - 1)) {
  }
}

void Arrivals::Calls::Arrive() {
  ++there;
  GiveUp();
}

void Arrivals::Calls::End(bool was_cancelled) {
  if (was_cancelled)
    ++cancelled;
  else
    --there;
}

// A call that is cancelled while it begins never arrives. The others do within moments: as many as
// were under way all the time for two ticks are such calls.
void Arrivals::Calls::Tick() {
  const int least = fewest;
  const int lost = std::min(least, fewest_before);
  for (int i = 0; i < lost; ++i) GiveUp();
  fewest_before = least - lost;
  fewest = under_way.load();
  refused = 0;
  there -= cancelled_before;
  cancelled_before = cancelled.exchange(0);
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

void Arrivals::Ended(std::string_view method, int lane, bool was_cancelled) {
  if (!IsOrlop(method)) return;
  all_.End(was_cancelled);
  of_[lane].End(was_cancelled);
}

void Arrivals::Tick() {
  others_left_ = kOthersPerTick;
  all_.Tick();
  for (Calls& calls : of_) calls.Tick();
}

}  // namespace orlop::server
