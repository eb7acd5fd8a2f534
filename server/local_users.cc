#include "server/local_users.h"

#include <grpcpp/security/auth_context.h>
#include <sys/types.h>
#include <unistd.h>

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/mutex.h"
#include "server/role_file.h"
#include "server/services/roles.h"
#include "server/socket_user.h"

namespace orlop::server {
namespace {

constexpr char kSeat[] = "orlop_seat";  // the property of a connection

std::shared_ptr<const Identity> Everything(const std::string& name) {
  Roles all = kClients;
  all.Add({Role::kPeer});
  return std::make_shared<const Identity>(Identity{name, {{all, "*"}}});
}

}  // namespace

LocalUsers::LocalUsers(const RoleFile* file)
    : file_(file),
      self_(geteuid()),
      owner_(Everything("the user of the server")),
      root_(Everything("root")),
      stranger_(std::make_shared<const Identity>(
          Identity{"a user of this host to whom --roles grants nothing (SECURITY.md)", {}})) {}

int LocalUsers::SeatOf(uid_t user) {
  if (user == self_) return 0;
  if (user == 0) return 1;
  if (file_ == nullptr) return kStrangers;
  {
    MutexLock lock(&mutex_);
    for (size_t i = 0; i < guests_.size(); ++i)
      if (guests_[i].user == user) return kStrangers + 1 + static_cast<int>(i);
    if (kStrangers + 1 + guests_.size() == kSeats) return kStrangers;
  }
  std::vector<std::string> names = NamesOf(user);
  if (file_->access()->Of(names, names[0]).grants.empty()) return kStrangers;
  MutexLock lock(&mutex_);
  guests_.push_back({user, std::move(names)});
  return kStrangers + static_cast<int>(guests_.size());
}

std::shared_ptr<const Identity> LocalUsers::Of(const grpc::AuthContext& context) const {
  const std::vector<grpc::string_ref> marks = context.FindPropertyValues(kSeat);
  int seat = kStrangers;
  if (marks.size() != 1 ||
      !absl::SimpleAtoi(absl::string_view(marks[0].data(), marks[0].size()), &seat))
    return stranger_;
  if (seat == 0) return owner_;
  if (seat == 1) return root_;
  MutexLock lock(&mutex_);
  const auto guest = static_cast<size_t>(seat - kStrangers - 1);
  if (guest >= guests_.size()) return stranger_;
  const std::vector<std::string>& names = guests_[guest].names;
  return std::make_shared<const Identity>(file_->access()->Of(names, names[0]));
}

void LocalUsers::Mark(int seat, grpc::AuthContext* context) {
  static Mutex mutex;  // two calls may be the first
  MutexLock lock(&mutex);
  if (context->FindPropertyValues(kSeat).empty()) context->AddProperty(kSeat, absl::StrCat(seat));
}

}  // namespace orlop::server
